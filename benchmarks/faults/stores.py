"""Stores that fail: an error at any byte, short answers, missing and forbidden objects."""

from __future__ import annotations

import contextlib
import errno
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.faults.world import (
    Row,
    World,
    call,
    picture,
    published,
    row_hashes,
    whole,
    write_files,
    write_shards,
)
from storage import files, retries
from tests import servers

IMAGES = 40


def check(world: World) -> Iterator[Row]:
    """The rows of the table."""
    yield http_transient(world)
    yield http_permanent(world)
    yield from local_faults(world)


def _listing(world: World, urls: list[str]) -> Path:
    path = world.folder / "list.csv"
    path.write_text("\n".join(["uri", *urls]))
    return path


def http_transient(world: World) -> Row:
    """A real server: busy once or twice for each object, or cut at a random byte the first time."""
    with servers.http_site() as site:
        urls = []
        for number in range(IMAGES):
            data = picture(number)
            fault: dict[str, Any] = (
                {"busy": 1 + number % 2}
                if number % 4 < 2
                else {"sent": world.random.randrange(len(data)), "cuts": 1 + number % 2}
            )
            urls.append(site.give(f"/{number}.jpg", data, **fault))
        output = world.fresh("out")
        ran = call(input=_listing(world, urls), allow_http=True, model=world.model, output=output)
        asked = sum(site.requests.values())
    features = ran.line["features"] if ran.line else 0
    return Row(
        f"http server busy, or cut at a random byte, once or twice for each of {IMAGES} objects",
        f"{IMAGES - features} lost ({asked} requests)",
        ran.code == 0 and features == IMAGES and asked >= 2 * IMAGES and whole(output),
    )


def http_permanent(world: World) -> Row:
    """A real server: objects that stay missing, forbidden, cut or busy."""
    faults: list[dict[str, Any]] = [{"status": 404}, {"status": 403}, {"sent": 100}, {"busy": 99}]
    with servers.http_site() as site:
        urls = [site.give(f"/{n}.jpg", picture(n)) for n in range(IMAGES)]
        urls += [site.give(f"/bad{n}.jpg", picture(n), **fault) for n, fault in enumerate(faults)]
        output = world.fresh("out")
        ran = call(input=_listing(world, urls), allow_http=True, model=world.model, output=output)
    classes = Counter(r["error_class"] for r in published(output) if r["kind"] == "failures")
    features = ran.line["features"] if ran.line else 0
    told = ", ".join(f"{count} {name}" for name, count in sorted(classes.items()))
    return Row(
        f"http server: 4 of {IMAGES + 4} objects missing, forbidden, always cut, always busy",
        f"{features} features, one failure row each: {told}",
        ran.code == 0 and features == IMAGES and classes.total() == 4 and whole(output),
    )


# --- the filesystem under every source ---------------------------------------------------------


class FlakyFiles:
    """Takes the place of `storage.files.open_read`: reading fails as `fault` says, now and then.

    `fault`: "error" raises at a byte, "short" ends there; `times`: for how many openings of a file
    whose name holds `among` and that is read so far.
    """

    def __init__(self, fault: str, at: int, times: int, among: str):
        self.fault, self.at, self.times, self.among = fault, at, times, among
        self.failed: Counter[str] = Counter()  # openings that the fault has reached
        self._open = files.open_read

    def open(self, path: str) -> Any:
        """The file, or one that fails."""
        if self.among not in path:
            return self._open(path)
        if self.failed[path] >= self.times:
            return self._open(path)
        if self.fault in ("missing", "forbidden"):
            self.failed[path] += 1
            kind = FileNotFoundError if self.fault == "missing" else PermissionError
            raise kind(f"{path}: {self.fault}")
        return Failing(path, self)


class Failing(io.FileIO):
    """A file that fails at a byte."""

    def __init__(self, path: str, how: FlakyFiles):
        super().__init__(path)
        self._how, self._reached = how, False

    def read(self, size: int | None = -1) -> bytes:
        """Bytes up to the bad one."""
        left = self._how.at - self.tell()
        if size is None or size < 0 or size > left:
            self._how.failed[str(self.name)] += not self._reached
            self._reached = True
        if left <= 0 and self._how.fault == "error":
            raise OSError(errno.EIO, "the line is dead")
        wanted = left if size is None or size < 0 else min(size, left)
        return super().read(max(wanted, 0))

    def readall(self) -> bytes:
        """As `read`."""
        return self.read()


@contextlib.contextmanager
def flaky(how: FlakyFiles) -> Iterator[None]:
    """While this lasts, files are opened by `how`, and tries follow at once."""
    with (
        mock.patch.object(files, "open_read", how.open),
        mock.patch.object(retries, "FIRST_WAIT", 0.0),
    ):
        yield


def local_faults(world: World) -> Iterator[Row]:
    """Files and TFRecords over a filesystem that fails at random bytes."""
    sources = {
        "image files": str(write_files(world.fresh("in"), IMAGES)),
        "TFRecords": write_shards(world.fresh("records"), range(IMAGES), 4),
    }
    for name, source in sources.items():
        flags = {"input": source, "model": world.model}
        calm = world.fresh("calm")
        assert call(output=calm, **flags).line["features"] == IMAGES
        assert whole(calm)
        infos = list(files.find(source))
        size = min(info.size for info in infos)
        lost = missed = 0
        for turn in range(world.times):
            fault, at = ("error", "short")[turn % 2], world.random.randrange(size)
            output = world.fresh("out")
            how = FlakyFiles(fault, at, 1 + turn // 2 % 2, source)
            with flaky(how):
                call(output=output, **flags)
            lost += len(set(row_hashes(calm)) - set(row_hashes(output)))
            missed += sum(how.failed[info.path] < how.times for info in infos)
        yield Row(
            f"{name}: an error or a short read at {world.times} random bytes, once or twice a file",
            f"{lost} lost" + (f", {missed} files not disturbed" if missed else ""),
            lost == missed == 0,
        )
        yield permanent(world, name, source)


def permanent(world: World, name: str, source: str) -> Row:
    """One file of several that stays broken: one failure row, and the others whole."""
    infos = list(files.find(source))
    bad = infos[1]
    told, good = [], True
    for fault in ("error", "short", "missing", "forbidden"):
        output = world.fresh("out")
        with flaky(FlakyFiles(fault, bad.size // 2, 10**9, bad.path)):
            ran = call(output=output, input=source, model=world.model, max_failure_rate=1)
        rows = published(output)
        failures = [row["error_class"] for row in rows if row["kind"] == "failures"]
        others = {row["source"] for row in rows if row["kind"] == "features"} - {bad.path}
        good = good and ran.code == 0 and len(failures) == 1 and whole(output)
        good = good and others == {info.path for info in infos} - {bad.path}
        told.append(f"{fault}: {', '.join(failures)}")
    return Row(f"{name}: one file of {len(infos)} that stays broken", "; ".join(told), good)
