"""Write a page about an output, to look at it.

    python -m pipeline.report out/features

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

NAME = "report.html"
MOST = 5000  # rows
# Of fields of another shape.
_WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = OneLineParser(
        prog="python -m pipeline.report",
        usage="python -m pipeline.report OUT [flags]",
        description=f"Write OUT/{NAME}, one page that needs nothing else: counts, reasons of "
        "failures with examples, where the time went, sizes and labels of pictures, vectors and a "
        "map of them, the most alike pairs, options. The last line of stdout is JSON. Exit 0 "
        "written, 1 damaged, 2 nothing there or no place to write to. Beam's flags for gs:// and "
        "s3:// pass through.",
        allow_abbrev=False,
    )
    result.add_argument("output", metavar="OUT", help="what a run wrote to: local, gs:// or s3://")
    result.add_argument(
        "--rows",
        type=int,
        default=2000,
        metavar="N",
        help=f"about so many rows, at most {MOST}, spread over the files, stand for all "
        "(default 2000)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code.

    0, 1 where the output is damaged or is none, 2 where nothing is there, it cannot be written to,
    or a flag is wrong.
    """
    there = False
    try:
        request, beam_args = parse_beside_beam(parser(), argv)
        if not 1 <= request.rows <= MOST:
            raise RequestError(
                f"--rows {request.rows}: from 1 to {MOST}, for each is compared with all others"
            )
        output = files.absolute(request.output)
        if files.is_remote(output):
            files.configure_stores(beam_args)
        there = reach.soon(output, lambda: files.occupied(output))
        import pyarrow as pa  # after the flags: --help needs no library

        from formats.manifest import read_manifest
        from formats.overview import look
        from formats.page import page

        manifest = read_manifest(output)
        if manifest is None:
            raise RequestError(
                f"{output}: no output of this program, it has no manifest.json; give the --output "
                "of a run that was published, or the folder under _failed of one that was not"
            )
        try:
            text = page(output, look(output, manifest, request.rows))
        except (pa.ArrowException, OSError, *_WRONG) as error:
            told = f"{type(error).__name__}: {error}"
            stdio.tell_error(f"{told}; python -m pipeline.verify tells of all damage")
            return 1
        there = False  # what lies there is whole: an error from here on is of the place
        path = files.join(output, NAME)
        data = text.encode("utf-8", "backslashreplace")  # of a path that is no UTF-8
        files.write_bytes(path, data)
    except (RequestError, OSError) as error:
        stdio.tell_error(error)
        return 1 if there else 2
    stdio.tell(json.dumps({"report": path, "bytes": len(data)}))
    return 0


if __name__ == "__main__":
    stdio.open_missing()
    sys.exit(main())
