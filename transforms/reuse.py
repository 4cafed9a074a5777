"""Vectors of pictures that came before, by the digest of their encoded bytes: bounded in bytes; and
which are being computed.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from formats.records import Failure, Features

Vectors = Mapping[str, np.ndarray]
Computed = tuple[list[Features | Failure], bool]
Running = tuple["Future[Computed]", int]  # and which of them

MAX_BYTES = 32 << 20  # some 4,000 pictures of nasnet_mobile; a whole job has 1.2 GB
_ENTRY_BYTES = 500  # of the digest and the objects around the numbers


class Known:
    """The vectors of the pictures that were last computed or asked for, and where those that are
    still computed will come from. Threads may share it.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, tuple[Vectors, int]] = OrderedDict()  # and their bytes
        self._running: dict[str, Running] = {}
        self._lock = threading.Lock()

    def get(self, sha256: str) -> Vectors | Running | None:
        """The vectors of the picture with this digest, or where they will come from; else None."""
        with self._lock:
            if sha256 not in self._entries:
                running = self._running.get(sha256)
                failed = running and running[0].done() and running[0].exception()
                return None if failed else running
            self._entries.move_to_end(sha256)
            return self._entries[sha256][0]

    def expect(self, digests: Sequence[str], results: Future[Computed]) -> None:
        """The pictures of `digests` are being computed: `results` will be theirs, in order."""
        with self._lock:
            self._running.update((each, (results, at)) for at, each in enumerate(digests))
        results.add_done_callback(functools.partial(self._remember, digests))

    def _remember(self, digests: Sequence[str], results: Future[Computed]) -> None:
        if not results.exception():
            for each, result in zip(digests, results.result()[0], strict=True):
                if isinstance(result, Features):
                    self.put(each, result.vectors)
        with self._lock:
            for each in digests:
                if self._running.get(each, (None,))[0] is results:
                    del self._running[each]

    def put(self, sha256: str, vectors: Vectors) -> None:
        """Remember `vectors`; what was longest not asked for makes room."""
        # Copies: rows of a batch would keep all of it in memory.
        kept = {name: values.copy() for name, values in vectors.items()}
        size = _ENTRY_BYTES + sum(values.nbytes for values in kept.values())
        with self._lock:
            if sha256 in self._entries:
                return
            self._entries[sha256] = kept, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= self._entries.popitem(last=False)[1][1]


@functools.lru_cache(2)  # of a process that runs one job after another
def known_in(run: str) -> Known:
    """This process's vectors of one run, whose model and preprocessing are the same throughout."""
    return Known()
