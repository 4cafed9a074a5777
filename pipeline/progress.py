"""How far a run is, told in the log now and then, where its workers are threads of this process."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from transforms import metrics

EVERY = 30.0  # seconds; small jobs end before they have told anything

log = logging.getLogger("pipeline")


# What is counted of each step: transform and counters.
_STEPS = {
    "read": ("ReadImages", ("images",)),
    "decoded": ("DecodeImages", ("images",)),
    "through the model": ("ExtractFeatures", ("batch_filled", "reused")),
}


@contextlib.contextmanager
def told(stop_after: str | None = None, every: float | None = None) -> Iterator[None]:
    """While the block runs: a line every `every` seconds (None: EVERY) in which it has come on.

    `stop_after`: the run's last step, read or decode, None for the model.
    """
    shown = {"read": ["read"], "decode": ["read", "decoded"]}.get(
        stop_after or "", ["read", "through the model"]
    )
    ended = threading.Event()
    teller = threading.Thread(
        target=_tell,
        args=(shown, _counted(shown), EVERY if every is None else every, ended),
        daemon=True,
    )
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _tell(shown: list[str], start: list[int], every: float, ended: threading.Event) -> None:
    last, since = start, time.monotonic()
    while not ended.wait(every):
        now, at = _counted(shown), time.monotonic()
        if now != last:
            *steps, failed = (count - before for count, before in zip(now, start, strict=True))
            told = ", ".join(f"{n:,} {step}" for n, step in zip(steps, shown, strict=True))
            rate = (now[-2] - last[-2]) / (at - since)  # of the last step
            log.info("images: %s (%s a second), %s failed", told, f"{rate:,.1f}", f"{failed:,}")
        last, since = now, at


def _counted(shown: list[str]) -> list[int]:
    """How many images each step has counted in this process so far, and how many have failed."""
    totals = metrics.totals()
    steps = [_STEPS[step] for step in shown]
    return [
        *(sum(totals[transform, name] for name in names) for transform, names in steps),
        sum(count for (_, name), count in totals.items() if name == "failures"),
    ]
