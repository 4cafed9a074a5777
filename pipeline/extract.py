"""Extract image embeddings and logits to Parquet.

    python -m pipeline.extract --input 'photos/*.jpg' --model out/nasnet_mobile --output out/a

On Dataflow the same with `--runner DataflowRunner --project P --region R --temp_location gs://B/t`.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, TextIO

if not __package__:  # run by its path, as some schedulers do: its own folder would hide the rooms
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pipeline import options as flags
from storage import imports, stdio
from storage.errors import RequestError, RunError
from storage.secrets import hide

# Beam imports them for sources and sinks that no job of ours has: a third of a second of a start.
_UNUSED = ("google.cloud.bigquery", "google.cloud.pubsub")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that `argv` (without the program's name) asks for; returns the exit code.

    0 complete, 1 the run failed, 2 the request is wrong, 3 too many failures.
    """
    try:
        options, beam_args = flags.parse(sys.argv[1:] if argv is None else argv)
        from pipeline import job  # after the flags: --help needs the standard library only

        return job.tell(job.run(options, beam_args))
    except RequestError as error:
        stdio.tell_error(error)
        return 2


def run_process(command: Callable[[], int]) -> NoReturn:
    """Run `command` as this process: logs to stderr, signals answered, its result the exit code."""
    stdio.open_missing()
    logging.basicConfig(level=logging.WARNING, handlers=[log_handler()])
    logging.getLogger("pipeline").setLevel(logging.INFO)
    _tell_of_dataflow()
    imports.hide(*_UNUSED)
    answer = functools.partial(_interrupted, os.dup(2))
    signal.signal(signal.SIGINT, answer)
    signal.signal(signal.SIGTERM, answer)
    code = command()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader has gone
            stream.flush()
    _leave(code)  # TensorFlow's and Beam's threads need not be waited for


def log_handler(stream: TextIO | None = None) -> logging.Handler:
    """What writes logs to `stream` (None: stderr), a failure once and in one line."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Discreet("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_is_news)
    return handler


class _Discreet(logging.Formatter):
    """Logs without credentials, whoever wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


def _is_news(record: logging.LogRecord) -> bool:
    """False for Beam's traceback of an error that the job tells itself, and for a wrong warning."""
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("apache_beam.") and isinstance(error, OSError | RunError):
        return False
    return not record.getMessage().startswith("Resource module is not available")


def _tell_of_dataflow() -> None:
    """Log a job's states on Dataflow, its address, and its id, for which Airflow reads stderr."""
    logging.getLogger("apache_beam.runners.dataflow").setLevel(logging.INFO)
    client = logging.getLogger("apache_beam.runners.dataflow.internal.apiclient")
    client.addFilter(_is_told)


def _is_told(record: logging.LogRecord) -> bool:
    """False for what Beam tells of every upload, and of every option, secrets too."""
    told = ("Created job with id", "To access the Dataflow")
    return record.levelno > logging.INFO or str(record.msg).startswith(told)


def _interrupted(stderr: int, number: int, frame: FrameType | None) -> None:
    """End the process for a signal: 128 + its number, without a commit or temporary files.

    `stderr` is told: what 2 was at first, for an import of TensorFlow holds back what goes there.
    """
    # An import here could wait for, or find half done, the one that the signal broke into.
    temporaries = sys.modules.get("storage.temporaries")
    try:
        if temporaries is not None and hasattr(temporaries, "abandon_all"):
            temporaries.abandon_all(for_good=True)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # Ctrl-C ends `2>&1 | tee log` too, with its reader
            told = getattr(sys.modules.get("pipeline.job"), "left_behind", None)
            os.write(stderr, f"interrupted by {name}{f'; {told}' if told else ''}\n".encode())
    finally:
        _leave(128 + number)  # threads of the runner would hold a gentler exit back


def _leave(code: int) -> NoReturn:
    """End the process at once, and the servers that Beam has started for it (Prism, a job server).

    Beam would end them in handlers that are not called here.
    """
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as children:
            for child in children.read().split():
                os.kill(int(child), signal.SIGTERM)
    os._exit(code)


if __name__ == "__main__":
    run_process(main)
