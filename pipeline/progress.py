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


@contextlib.contextmanager
def told(every: float | None = None) -> Iterator[None]:
    """While the block runs: a line every `every` seconds (None: EVERY) in which it has come on."""
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(EVERY if every is None else every, ended))
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _tell(every: float, ended: threading.Event) -> None:
    start = last = _counted()
    since = time.monotonic()
    while not ended.wait(every):
        now, at = _counted(), time.monotonic()
        if now != last:
            read, done, failed = (count - before for count, before in zip(now, start, strict=True))
            rate = (now[1] - last[1]) / (at - since)
            log.info(
                "%s images read, %s through the model (%s a second), %s failed",
                *(f"{read:,}", f"{done:,}", f"{rate:,.1f}", f"{failed:,}"),
            )
        last, since = now, at


def _counted() -> tuple[int, int, int]:
    """Images read, those that went through the model, and failures, of this process so far."""
    totals = metrics.totals()
    done = ("batch_filled", "reused")
    return (
        totals["ReadImages", "images"],
        sum(totals["ExtractFeatures", name] for name in done),
        sum(count for (_, name), count in totals.items() if name == "failures"),
    )
