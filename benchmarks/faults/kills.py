"""Processes that end before their time: kill -9, SIGTERM, SIGINT at any moment; two at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.faults.world import (
    Row,
    World,
    files_below,
    finish,
    leftovers,
    manifest,
    picture,
    row_hashes,
    start,
    whole,
    write_shards,
)
from tests import servers

IMAGES, IDS, ROWS_PER_FILE = 600, 550, 5  # ids that stand twice make the commit write files too
_PATIENCE = 10.0  # seconds in which a signal must have ended the process


@dataclass(frozen=True)
class Calm:
    """A run that nobody disturbs: its flags, its rows, and when its parts and its end came.

    `first` and `last`: seconds after the start at which the first and the last file was closed.
    """

    flags: dict[str, Any]
    rows: list[tuple[str, str]]
    parts: int
    first: float
    last: float
    end: float


def check(world: World) -> Iterator[Row]:
    """The rows of the table."""
    calm = calm_run(world)
    yield killed(world, calm)
    for number in (signal.SIGTERM, signal.SIGINT):
        yield interrupted(world, calm, number)
    for if_exists in ("error", "overwrite", "resume"):
        yield two_at_once(world, calm, if_exists)
    yield kept_by_time(world)


def calm_run(world: World) -> Calm:
    """The undisturbed run."""
    folder = write_shards(world.fresh("in"), [n % IDS for n in range(IMAGES)], 3)
    flags = {
        "input": folder,
        "id_key": "id",
        "model": world.model,
        "rows_per_file": ROWS_PER_FILE,
        "max_failure_rate": 1,
    }
    output = world.fresh("calm")
    begun = time.monotonic()
    process = start(output=output, **flags)
    seen: list[float] = []
    count = 0
    while process.poll() is None and not (output / "manifest.json").exists():
        if (now := parts_of(output)) > count:
            count = now
            seen.append(time.monotonic() - begun)
        time.sleep(0.002)
    last = seen[-1]
    ran = finish(process)
    assert ran.code == 0, ran.stderr
    parts = -(-IMAGES // ROWS_PER_FILE)
    return Calm(flags, row_hashes(output), parts, seen[0], last, time.monotonic() - begun)


def parts_of(output: Path) -> int:
    """How many data files a run has closed."""
    try:
        return sum(name.startswith("part-") for name in os.listdir(output / "features"))
    except FileNotFoundError:
        return 0


def wait_for(world: World, calm: Calm, process: subprocess.Popen[str], output: Path) -> None:
    """Wait until a random moment of the run: before its first file, in its work, or in its commit.

    Each as likely as the others, though starting takes most of the time.
    """
    phase = world.random.choice(("start", "work", "commit"))
    if phase == "start":
        time.sleep(world.random.uniform(0.0, calm.first))
        return
    wanted = 1 if phase == "work" else calm.parts
    while process.poll() is None and parts_of(output) < wanted:
        time.sleep(0.001)
    most = (calm.last - calm.first) if phase == "work" else (calm.end - calm.last)
    time.sleep(world.random.uniform(0.0, most))


def phase_of(calm: Calm, output: Path) -> str:
    """What a process was about when it ended, by what it left."""
    written = parts_of(output)
    if (output / "manifest.json").exists():
        return "commit, after the manifest"
    if not written:
        return "start"
    return "reading and writing" if written < calm.parts else "commit, before the manifest"


def _own_end(code: int) -> int:
    """`code`, the exit status of a kill or a whole run; RuntimeError for any other."""
    if code > 0:
        raise RuntimeError(f"a run that nothing disturbed ended with {code}")
    return code


def killed(world: World, calm: Calm) -> Row:
    """kill -9, in every second trial the run that resumes too, then --if_exists resume."""
    phases: Counter[str] = Counter()
    lost = doubled = left = kept = 0
    for turn in range(world.times):
        ended = 0
        while ended >= 0:  # a moment after the run's end is drawn again
            output = world.fresh("out")
            process = start(output=output, if_exists="resume", **calm.flags)
            wait_for(world, calm, process, output)
            process.kill()
            ended = _own_end(finish(process).code)
        phases[phase_of(calm, output)] += 1
        if turn % 2:  # the run that goes on is killed too
            process = start(output=output, if_exists="resume", **calm.flags)
            time.sleep(world.random.uniform(0.7 * calm.first, calm.end))
            if process.poll() is None:
                process.kill()
                phases["resuming"] += 1
            finish(process)
        ran = finish(start(output=output, if_exists="resume", **calm.flags))
        rows = row_hashes(output)
        keys = [key for key, _ in rows]
        lost += len(set(calm.rows) - set(rows)) if ran.code == 0 else IMAGES
        doubled += len(keys) - len(set(keys))
        left += len(leftovers(output)) + (not whole(output))
        kept += ran.line["skipped"] if ran.line else 0
    told = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    return Row(
        f"kill -9 at {phases.total()} random moments ({told}), resume",
        f"{lost} lost, {doubled} duplicate, {left} leftovers; "
        f"{kept / world.times:.0f} of {IMAGES} images kept in the mean",
        not (lost or doubled or left) and phases.total() >= world.times,
    )


def kept_by_time(world: World) -> Row:
    """A run of minutes with no bound but the default: what kill -9 costs of it.

    Pictures come from a server that takes its time; once the first file is closed, by the bound of
    60 s, the run is killed, and what goes on has a quick server.
    """
    images = 4000
    with servers.http_site() as site:
        for number in range(images):
            site.give(f"/{number}.jpg", picture(number % 50), pieces=25)  # half a second each
        rows = [f"{site.address}/{number}.jpg" for number in range(images)]
        (world.folder / "list.csv").write_text("\n".join(["uri", *rows]))
        flags = {
            "input": world.folder / "list.csv",
            "allow_http": True,
            "model": world.model,
            "output": world.fresh("out"),
            "if_exists": "resume",
        }
        process = start(**flags)
        while process.poll() is None and not site.requests:
            time.sleep(0.01)
        begun = time.monotonic()
        while process.poll() is None and not parts_of(flags["output"]):
            time.sleep(0.01)
        closed = time.monotonic() - begun
        time.sleep(world.random.uniform(1, 20))
        seconds = time.monotonic() - begun
        process.kill()
        finish(process)
        asked = len(site.requests)
        for path, answer in list(site.answers.items()):
            site.answers[path] = replace(answer, pieces=1)
        ran = finish(start(**flags))
    kept = ran.line["skipped"] if ran.line else 0
    good = ran.code == 0 and whole(flags["output"]) and not leftovers(flags["output"])
    return Row(
        f"kill -9 after {seconds:.0f} s of reading, files as large as they come, resume",
        f"first file closed after {closed:.0f} s; {kept} of {asked} images kept; "
        f"{len(row_hashes(flags['output']))} rows of {images}",
        good and len(row_hashes(flags["output"])) == images and kept > 0 and closed < 75,
    )


def interrupted(world: World, calm: Calm, number: signal.Signals) -> Row:
    """The signal at random moments: exit code, seconds, what is left, and a resumed run."""
    phases: Counter[str] = Counter()
    wrong: list[str] = []
    slowest, tries = 0.0, 0
    scratch = world.fresh("scratch")
    scratch.mkdir()
    env = {"TMPDIR": str(scratch)}
    while tries < world.times:
        output = world.fresh("out")
        process = start(env, output=output, **calm.flags)
        wait_for(world, calm, process, output)
        if process.poll() is not None:
            _own_end(finish(process).code)
            continue  # it was done before
        tries += 1
        begun = time.monotonic()
        process.send_signal(number)
        try:
            code = finish(process, _PATIENCE).code
        except subprocess.TimeoutExpired:
            process.kill()
            code = finish(process).code
        # The processes that decode are ended by the kernel once the job is gone.
        while session(process.pid) and time.monotonic() - begun < _PATIENCE:
            time.sleep(0.01)
        slowest = max(slowest, time.monotonic() - begun)
        phases[phase := phase_of(calm, output)] += 1
        # Before the program's first line Python's own answer stands, which a shell shows alike.
        if code not in (128 + number, -number) and not (code == 0 and whole(output)):
            wrong.append(f"{phase}: exit {code}")
        temporary = [name for name in files_below(output) if not is_data(name)]
        if manifest(output) is None or whole(output):
            temporary = [n for n in temporary if n not in ("manifest.json", "_SUCCESS")]
        wrong += [f"{phase}: {name}" for name in temporary]
        wrong += [f"{phase}: TMPDIR/{name}" for name in os.listdir(scratch)]
        wrong += [f"{phase}: process {pid} lives on" for pid in session(process.pid)]
    told = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    return Row(
        f"{number.name} at {tries} random moments ({told})",
        f"exit {128 + number} within {slowest:.1f} s, {len(wrong)} left or wrong"
        + (f": {'; '.join(wrong[:3])}" if wrong else ""),
        not wrong and slowest < _PATIENCE,
    )


def is_data(name: str) -> bool:
    """Whether this is a closed data file, which a resumed run takes over."""
    return name.startswith(("features/part-", "failures/part-"))


def session(leader: int) -> list[int]:
    """Processes that live in the session of `leader`."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = (Path("/proc") / entry / "stat").read_text().rpartition(")")[2].split()
            if entry.isdigit() and int(status[3]) == leader and status[0] != "Z":
                found.append(int(entry))
    return found


def two_at_once(world: World, calm: Calm, if_exists: str) -> Row:
    """Two runs into one output, the second up to two seconds later."""
    pairs = max(1, world.times // 4)
    wrong, refused, done = 0, 0, 0
    for _ in range(pairs):
        output = world.fresh("out")
        flags = {**calm.flags, "output": output, "if_exists": if_exists}
        processes = [start(**flags)]
        time.sleep(world.random.uniform(0, 2))
        processes.append(start(**flags))
        codes = [finish(process).code for process in processes]
        done += codes.count(0)
        refused += len(codes) - codes.count(0)
        wrong += not (
            0 in codes
            and set(codes) <= {0, 1, 2}
            and row_hashes(output) == calm.rows
            and whole(output)
            and not leftovers(output)
        )
    return Row(
        f"two runs at once, --if_exists {if_exists}",
        f"{pairs - wrong} of {pairs} one whole result without leftovers "
        f"({done} runs complete, {refused} refused)",
        not wrong,
    )
