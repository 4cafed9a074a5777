"""Hold the files of an output against its manifest.

    python -m pipeline.verify out/features

Beam's flags for gs:// and s3:// (--s3_endpoint_url, --no_auth, ...) pass through.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipeline.options import OneLineParser, parse_beside_beam
from storage import files, reach, stdio
from storage.errors import RequestError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = OneLineParser(
        prog="python -m pipeline.verify",
        usage="python -m pipeline.verify OUT [flags]",
        description="Hold an output against its manifest: presence, sha256, page checksums, rows, "
        "unique keys, finite vectors of the right width, one schema, counts. A line a problem on "
        "stderr, a JSON summary as the last line of stdout. Exit 0 whole, 1 damaged, 2 nothing "
        "there at all. Beam's flags for gs:// and s3:// pass through.",
        allow_abbrev=False,
    )
    result.add_argument("output", metavar="OUT", help="what a run wrote to: local, gs:// or s3://")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Verify; returns the exit code: 0 whole, 1 damaged, 2 nothing is there at all."""
    there, output = False, None
    try:
        request, beam_args = parse_beside_beam(parser(), argv)
        output = files.absolute(request.output)
        if files.is_remote(output):
            files.configure_stores(beam_args)
        there = reach.soon(output, lambda: files.occupied(str(output)))
        from formats.verification import verify  # after the flags: --help needs no library

        result = verify(output, lambda line: stdio.tell(line, "stderr"))
    except (RequestError, OSError) as error:
        stdio.tell_error(error)
        if there:
            stdio.tell(json.dumps({"status": "unreadable", "output": output, "problems": 1}))
        return 1 if there else 2
    stdio.tell(json.dumps(result))
    return 0 if result["status"] == "ok" else 1


if __name__ == "__main__":
    stdio.open_missing()
    sys.exit(main())
