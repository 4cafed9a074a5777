"""Threads that work ahead of a bundle: results in order, memory bounded."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from storage.cores import available_cores

In = TypeVar("In")
Out = TypeVar("Out")


@functools.cache
def cpu_threads() -> ThreadPoolExecutor:
    """This process's threads for work that releases the GIL, one a core, shared by all bundles."""
    return ThreadPoolExecutor(available_cores(), thread_name_prefix="cpu")


@functools.cache
def io_threads() -> ThreadPoolExecutor:
    """This process's threads for reading, which mostly wait for a store."""
    return ThreadPoolExecutor(16, thread_name_prefix="io")


@functools.cache
def model_threads(count: int) -> ThreadPoolExecutor:
    """This process's threads for running the model, one for each copy of it."""
    return ThreadPoolExecutor(count, thread_name_prefix="model")


class Busy:
    """How long at least one of the works begun was not ended. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works = 0
        self._before = self._since = self._told = 0.0

    def begin(self) -> None:
        """A work has begun."""
        with self._lock:
            if not self._works:
                self._since = time.perf_counter()
            self._works += 1

    def end(self) -> None:
        """One of the works has ended."""
        with self._lock:
            self._works -= 1
            if not self._works:
                self._before += time.perf_counter() - self._since

    def lap(self) -> float:
        """Seconds of it since the last lap."""
        with self._lock:
            before, self._told = self._told, self._until(time.perf_counter())
            return self._told - before

    def idle(self) -> float:
        """A clock of seconds that stands still while a work goes on."""
        with self._lock:
            now = time.perf_counter()
            return now - self._until(now)

    def _until(self, now: float) -> float:
        return self._before + (now - self._since if self._works else 0.0)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.model = Busy()


_of_thread = _OfThread()


def model_busy() -> Busy:
    """What the model does for the images that the calling thread carries through the steps."""
    return _of_thread.model


class Lookahead(Generic[In, Out]):
    """Applies `function` to what is pushed, on `threads`, and hands results back in order.

    At most `depth` items, and about `max_bytes` of what `weigh` says of them, are held; pushing
    more waits for the oldest. Given `start`, only so many are held at first, and half of what has
    been pushed later, so that results come soon. An exception of `function` is raised where its
    result is due. Waiting is measured by `clock`.
    """

    def __init__(
        self,
        function: Callable[[In], Out],
        threads: ThreadPoolExecutor,
        depth: int,
        weigh: Callable[[In], int] = lambda item: 0,
        max_bytes: int = 64 << 20,
        start: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._function = function
        self._threads = threads
        self._depth = depth
        self._start = depth if start is None else start
        self._pushed = 0
        self._weigh = weigh
        self._max_bytes = max_bytes
        self._clock = clock
        self._pending: deque[tuple[int, Future[Out]]] = deque()
        self._bytes = 0
        self.waited = 0.0  # seconds, for results that were due and not there

    def push(self, item: In) -> Iterator[Out]:
        """Start on `item`; yields the oldest results, as many as must make room."""
        weight = self._weigh(item)
        self._pending.append((weight, self._threads.submit(self._function, item)))
        self._bytes += weight
        self._pushed += 1
        depth = min(self._depth, max(self._start, self._pushed // 2))
        while len(self._pending) > depth or (
            self._bytes > self._max_bytes and len(self._pending) > 1
        ):
            yield self._oldest()

    def drain(self) -> Iterator[Out]:
        """Yields every result that is still due."""
        while self._pending:
            yield self._oldest()

    def abandon(self) -> None:
        """Start on nothing more, and wait for what has been started: nobody wants the results."""
        wait([future for _, future in self._pending if not future.cancel()])
        self._pending.clear()

    def cancel(self) -> None:
        """Start on nothing more; what has been started goes on, and nobody gets its results."""
        for _, future in self._pending:
            future.cancel()
        self._pending.clear()

    def _oldest(self) -> Out:
        weight, future = self._pending.popleft()
        self._bytes -= weight
        start = self._clock()
        try:
            return future.result()
        finally:
            self.waited += self._clock() - start


def map_ahead(
    function: Callable[[In], Out],
    items: Iterable[In],
    threads: ThreadPoolExecutor,
    depth: int,
    weigh: Callable[[In], int] = lambda item: 0,
) -> Iterator[Out]:
    """`map(function, items)` on `threads`, ahead as far as `Lookahead` goes."""
    ahead = Lookahead(function, threads, depth, weigh)
    try:
        for item in items:
            yield from ahead.push(item)
        yield from ahead.drain()
    finally:
        ahead.cancel()
