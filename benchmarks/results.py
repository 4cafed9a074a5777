"""What was measured: docs/performance.json holds it, the pages of docs/ show it between markers.

A part stands between `<!-- measured: NAME -->` and `<!-- end -->`, in whichever page has its name.
"""

from __future__ import annotations

import calendar
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.processes import load
from formats import resampling

NEAR = 3600  # seconds between two runs that are held against each other
ROOT = Path(__file__).parents[1]
DATA = Path("docs/performance.json")
PAGES = "docs/*.md"
# What a machine's name does not say, which is of several generations.
_KNOWN = {
    "family 26 model 2,": "Zen 5",
    "family 25 model 17,": "Zen 4",
    "family 25 model 1,": "Zen 3",
    "family 23 model 1,": "Zen 1",
    "family 6 model 207,": "Xeon without AMX",
    "family 6, 126 GiB": "Xeon with AMX",
}
Runs = dict[str, list[dict[str, Any]]]  # by name, in the order in which they were taken
_PACKAGES = ("tensorflow", "apache-beam", "pillow", "numpy", "openvino", "torch", "timm")


def circumstances(cores: int | None = None) -> dict[str, Any]:
    """Where and when: machine, versions, commit, load; `cores` where not all of this process's."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = dict(re.findall(r"^(\S[^:\t]*?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    # A name is of several generations: Zen 3 and Zen 4 of a cloud differ in their model only.
    model = "{model name}, family {cpu family} model {model}"
    model = model.format(**cpu) if "cpu family" in cpu else platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", ".", ":!docs"):  # where figures are written meanwhile
        commit += ", changed"
    return {
        "cores": cores or len(os.sched_getaffinity(0)),
        "machine": f"{model}, {memory:.0f} GiB",
        "python": platform.python_version(),
        "versions": found,
        "commit": commit,
        "compiled": resampling.COMPILED is not None,
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "load": round(load(), 1),
    }


def _git(*request: str) -> str:
    return subprocess.run(
        ["git", *request], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def read(folder: Path) -> dict[str, Any]:
    """What `folder` (the checkout, or one that only has the two files) holds so far."""
    path = folder / DATA
    return dict(json.loads(path.read_text())) if path.exists() else {}


def add(folder: Path, part: str, name: str, run: dict[str, Any], cores: int | None = None) -> None:
    """Add `run`, with its circumstances, to the runs of `name` in `part`; at once, on disk."""
    data = read(folder)
    data.setdefault(part, {}).setdefault(name, []).append({**run, "of": circumstances(cores)})
    _write(folder, data)


def forget(folder: Path, part: str, names: Iterable[str], cores: int | None = None) -> None:
    """Drop the runs of `names` in `part` on this machine, by as many cores: they are made anew."""
    data, here = read(folder), circumstances(cores)
    runs = data.get(part, {})
    for name in set(names) & set(runs):
        runs[name] = [
            one
            for one in runs[name]
            if any(one["of"][what] != here[what] for what in ("machine", "cores"))
        ]
    _write(folder, data)


def _write(folder: Path, data: dict[str, Any]) -> None:
    path = folder / DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(data, indent=1) + "\n")
    scratch.replace(path)


def show(folder: Path, part: str, text: str) -> None:
    """Print `text` and put it in its place in the pages, where there is one."""
    print(text)
    place = re.compile(rf"(<!-- measured: {part} -->\n).*?(<!-- end -->)", re.DOTALL)
    for path in folder.glob(PAGES):
        before = path.read_text()
        after = place.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before)
        if after != before:
            path.write_text(after)


def show_each(folder: Path, part: str, make: Callable[[Runs], str], place: str = "") -> None:
    """Show what `make` tells of the runs of `part`, for each machine by itself."""
    show(folder, place or part, each(folder, part, make))


def each(folder: Path, part: str, make: Callable[[Runs], str]) -> str:
    """What `make` tells of the runs of `part`, a paragraph for each machine that has any."""
    told = {machine: make(parts[part]) for machine, parts in by_machine(folder, part).items()}
    texts = [
        (f"On {machine}:\n\n" if len(told) > 1 else "") + text
        for machine, text in told.items()
        if text
    ]
    return "\n\n".join(texts)


def by_machine(folder: Path, only: str | None = None) -> dict[str, dict[str, Runs]]:
    """The runs of all parts, or of one, for each machine that has any, the last used one first.

    Where a part ran on some of a machine's cores and on others, these are machines of their own.
    """
    data = {part: runs for part, runs in read(folder).items() if only in (None, part)}
    cores: dict[tuple[str, str], set[int]] = {}
    for part, runs in data.items():
        for one in itertools.chain(*runs.values()):
            cores.setdefault((part, one["of"]["machine"]), set()).add(one["of"]["cores"])
    of: dict[str, dict[str, Runs]] = {}
    for part, runs in data.items():
        for name, found in runs.items():
            for one in found:
                machine = one["of"]["machine"]
                if len(cores[part, machine]) > 1:
                    machine += f", {one['of']['cores']} cores"
                own = of.setdefault(machine, {})
                own.setdefault(part, {}).setdefault(name, []).append(one)

    def last(machine: str) -> str:
        parts = of[machine].values()
        return max(one["of"]["at"] for runs in parts for found in runs.values() for one in found)

    return {machine: of[machine] for machine in sorted(of, key=last, reverse=True)}


def short(machine: str) -> str:
    """The name by which people know a machine, where one is known here."""
    cores = re.search(r", \d+ cores$", machine)
    known = next((name for told, name in _KNOWN.items() if told in machine), None)
    return machine if known is None else known + (cores[0] if cores else "")


def at(run: dict[str, Any]) -> float:
    """When a run ended, in seconds."""
    return calendar.timegm(time.strptime(run["of"]["at"], "%Y-%m-%d %H:%M"))


def median(runs: Iterable[dict[str, Any]], figure: str) -> float | None:
    """The median of a figure that some runs have."""
    values = [run[figure] for run in runs if run.get(figure) is not None]
    return statistics.median(values) if values else None


def comparable(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether they ended within an hour, of the same precision where the part has several."""
    return abs(at(run) - at(other)) <= NEAR and run.get("precision") == other.get("precision")


def nearest(run: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """That of `others` which ended nearest to `run`, None where none is comparable."""
    near = [other for other in others if comparable(run, other)]
    return min(near, key=lambda other: abs(at(run) - at(other)), default=None)


def paired(
    mine: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], figure: str
) -> float | None:
    """The median of mine / other, each run of the fewer against the nearest within an hour.

    So that a machine which slows down between two turns slows both sides of each ratio.
    """
    fewer, more, power = (mine, others, 1) if len(mine) <= len(others) else (others, mine, -1)
    pairs = [(one, nearest(one, more)) for one in fewer]
    ratios = [(one[figure] / other[figure]) ** power for one, other in pairs if other]
    return statistics.median(ratios) if ratios else None


def worst(
    mine: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], figure: str
) -> float | None:
    """The largest of mine / other, of all pairs that are comparable."""
    near = [
        one[figure] / other[figure] for one in mine for other in others if comparable(one, other)
    ]
    return max(near, default=None)


def spread(runs: Iterable[dict[str, Any]], figure: str, digits: int = 0) -> str:
    """Median (least to most) of a figure, `-` where there is none."""
    values = [run[figure] for run in runs if run.get(figure) is not None]
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def caption(runs: Iterable[dict[str, Any]]) -> str:
    """One paragraph: machine, versions, commits, times and loads of `runs`."""
    of = [run["of"] for run in runs]
    if not of:
        return ""
    last = max(of, key=lambda one: one["at"])
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    versions += "" if last.get("compiled", True) else ", resized by Pillow"
    commits = ", ".join(sorted({one["commit"] for one in of}))
    loads = [one["load"] for one in of]
    return (
        f"{last['machine']}, {last['cores']} cores; Python {last['python']}, {versions}. "
        f"Commits {commits}; {min(one['at'] for one in of)} to {last['at']} UTC, load average "
        f"{min(loads)} to {max(loads)} after each run."
    )
