"""Disks that are full: a real tmpfs of every size, and ENOSPC at every single write and rename."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.faults.world import (
    Ran,
    Row,
    World,
    call,
    files_below,
    leftovers,
    manifest,
    row_hashes,
    whole,
    write_files,
)
from storage import files

IMAGES, ROWS_PER_FILE = 30, 12
PAGE = 4096


def check(world: World) -> Iterator[Row]:
    """The rows of the table."""
    calm = Calm(world)
    yield from small_disks(world, calm)
    yield each_write(world, calm)


class Calm:
    """A run with room enough: its flags, into any output, and its rows."""

    def __init__(self, world: World):
        folder = write_files(world.fresh("in"), IMAGES)
        (folder / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
        self.flags = {
            "input": folder,
            "model": world.model,
            "rows_per_file": ROWS_PER_FILE,
            "max_failure_rate": 1,  # what is left to a re-run may be the bad picture alone
        }
        output = world.fresh("calm")
        assert self.run(output).code == 0
        self.rows = row_hashes(output)

    def run(self, output: Path) -> Ran:
        """The job into `output`, going on from what is there."""
        return call(output=output, if_exists="resume", **self.flags)

    def problem(self, output: Path, room: Callable[[], None]) -> str | None:
        """What is wrong with a run where there is no room, or with one after `room` was made.

        None for nothing, "" where the first run was not disturbed.
        """
        failed = self.run(output)
        if failed.code == 0:
            return "" if row_hashes(output) == self.rows else "complete, but not whole"
        if failed.code not in (1, 2) or not failed.short:
            return f"exit {failed.code}: {failed.stderr[:300]}"
        if [name for name in files_below(output) if ".tmp-" in name or "_run-" in name]:
            return f"temporary files: {list(files_below(output))}"
        if manifest(output) is not None and not whole(output):
            return "published, and not whole"
        room()
        again = self.run(output)
        if again.code or row_hashes(output) != self.rows or not whole(output) or leftovers(output):
            return f"the re-run: exit {again.code}, left {leftovers(output)}: {again.stderr[:300]}"
        return None


# --- a small tmpfs -----------------------------------------------------------------------------


@contextlib.contextmanager
def tmpfs(folder: Path, **limits: int) -> Iterator[Callable[[], None]]:
    """A tmpfs at `folder` with `limits` (size in bytes, nr_inodes); gives what lifts them.

    Raises PermissionError where mounting is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PermissionError(f"no tmpfs can be mounted: {done.stderr.strip()}")

    mount(",".join(f"{name}={value}" for name, value in limits.items()))
    try:
        yield lambda: mount("remount,size=64m,nr_inodes=10000")
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    """Take the tmpfs at `folder` away, now or when the last that looks into it has gone.

    Whatever watches mounts, or an exception that still holds a file, keeps one busy for a moment.
    """
    command = ["umount", str(folder)]
    for wait in (0.1, 0.3, 1, 3, 0):
        gc.collect()
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(wait)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_disks(world: World, calm: Calm) -> Iterator[Row]:
    """Every size in pages, and every number of files, from nothing to enough."""
    folder = world.folder / "disk"
    stride = -(-world.stride // 3)
    for limit, step, what in (("size", PAGE, "pages"), ("nr_inodes", 1, "files")):
        wrong: list[str] = []
        count = 0
        enough = False
        while not enough and count < 200:
            count += stride
            limits = {"size": 64 << 20, limit: count * step}
            try:
                with tmpfs(folder, **limits) as room:
                    told = calm.problem(folder / "out", room)
            except PermissionError as error:
                yield Row(f"disk full: tmpfs of every number of {what}", str(error), False)
                return
            enough = told == ""
            wrong += [f"{count} {what}: {told}"] if told else []
        tried = count // stride - 1
        yield Row(
            f"disk full: tmpfs of 1 to {count - 1} {what}, then room",
            f"{tried - len(wrong)} of {tried} one line, non-zero, a clean re-run"
            + "".join(f"; {text}" for text in wrong[:2]),
            not wrong and enough and tried > 0,
        )


# --- ENOSPC at the n-th write ------------------------------------------------------------------


class FullDisk:
    """Takes the place of what `storage.files` writes by, under its buffers; call `at` fails.

    Counts each write, flush to the system, creation, rename and folder; the call numbered `at`
    raises ENOSPC, and with `lasting` all after it do until `room` is called.
    """

    def __init__(self, at: int | None = None, lasting: bool = False):
        self.count = 0
        self._at, self._lasting = at, lasting

    def room(self) -> None:
        """There is room again."""
        self._at = None

    def step(self) -> None:
        """One call to the system."""
        self.count += 1
        if self._at and (self.count == self._at or (self._lasting and self.count > self._at)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, path: str, mode: str = "r", **how: Any) -> Any:
        """`open`, with a raw file for writing that may be refused."""
        if mode != "wb":
            return open(path, mode, **how)
        self.step()
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.step()
                return super().write(data)

        return io.BufferedWriter(Raw(path, "wb"))

    @contextlib.contextmanager
    def beneath(self) -> Iterator[None]:
        """While this lasts, `storage.files` writes to this disk."""

        def stepped(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.step()
                return function(*args, **kwargs)

            return call

        with (
            mock.patch.object(files, "open", self.open, create=True),
            mock.patch.object(os, "replace", stepped(os.replace)),
            mock.patch.object(os, "makedirs", stepped(os.makedirs)),
        ):
            yield


def each_write(world: World, calm: Calm) -> Row:
    """ENOSPC at the n-th call that asks for room, for every n, once and lasting."""
    wrong: list[str] = []
    disk = FullDisk()
    with disk.beneath():
        calm.run(world.fresh("out"))
    calls = disk.count
    numbers = range(1, calls + 1, world.stride)
    for at in numbers:
        for lasting in (False, True):
            disk = FullDisk(at, lasting)
            with disk.beneath():
                told = calm.problem(world.fresh("out"), disk.room)
            if told is not None:
                wrong.append(f"call {at}: {told or 'the error was passed over'}")
    return Row(
        f"ENOSPC at the n-th write, creation or rename, for every n of {calls}, once and lasting",
        f"{2 * len(numbers) - len(wrong)} of {2 * len(numbers)} one line, non-zero, a clean re-run"
        + "".join(f"; {text}" for text in wrong[:2]),
        calls > 0 and not wrong,
    )
