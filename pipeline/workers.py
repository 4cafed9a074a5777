"""A pool that starts Python workers for an engine: what `--environment_type EXTERNAL` asks for.

    python -m pipeline.workers --port 50000

One pool runs on each machine of a Flink or Spark cluster, whose job is then started with
`--environment_type EXTERNAL --environment_config localhost:50000`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from pipeline.options import OneLineParser
from storage import stdio
from storage.errors import RequestError


def parser() -> OneLineParser:
    """The command line."""
    result = OneLineParser(prog="python -m pipeline.workers", allow_abbrev=False)
    result.add_argument("--host", default="localhost", help="address to listen on")
    result.add_argument("--port", type=int, required=True, help="port to listen on; 0: any")
    pinned = "pin each worker to so many cores, of those that the fewest have"
    result.add_argument("--cores_each", type=int, help=pinned)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted or terminated; returns 0, or 2 where the request is wrong."""
    try:
        request = parser().parse_args(argv)
        if request.port not in range(65536):
            raise RequestError(f"--port {request.port}: must be 0 to 65535")
        cores = len(os.sched_getaffinity(0))
        if request.cores_each is not None and request.cores_each not in range(1, cores + 1):
            raise RequestError(
                f"--cores_each {request.cores_each}: must be 1 to {cores}, the cores that there are"
            )
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        from pipeline.pool import serve  # after the flags: --help needs the standard library only

        serve(request.host, request.port, request.cores_each)
    except RequestError as error:
        stdio.tell_error(error)
        return 2
    return 0


if __name__ == "__main__":
    stdio.open_missing()
    sys.exit(main())
