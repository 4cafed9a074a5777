"""Each target of the project with what was measured, out of all parts of docs/performance.json.

python -m benchmarks.targets        # writes the table, measures nothing
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import growth, large_pictures, results, startup, throughput

NAME = "targets"
Parts = dict[str, results.Runs]

MET, MISSED, NOT_SHOWN = "met", "missed", "not shown"
_PRECISIONS = (("bf16", "bfloat16"), ("f32", "float32"))
_GB = 1e9 / (1 << 20)  # in MiB


@dataclass(frozen=True)
class Target:
    """A figure and its bounds; `unrun`: what it was not held against, so that it is not met yet."""

    shown: str
    measured: float | None
    least: float | None = None
    most: float | None = None
    digits: int = 2
    unrun: tuple[str, ...] = ()

    @property
    def figure(self) -> str:
        """What was measured, as it is shown."""
        assert self.measured is not None
        return f"{round(self.measured, self.digits) + 0.0:.{self.digits}f}"  # no -0.0

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        bounds += [f"at most {self.most:.4g}"] if self.most is not None else []
        return ", ".join(bounds) or "-"

    @property
    def verdict(self) -> str:
        """MET, MISSED, NOT_SHOWN, or nothing where there are no bounds."""
        if self.measured is None or self.wanted == "-":
            return ""
        low = self.least is not None and self.measured < self.least
        high = self.most is not None and self.measured > self.most
        return MISSED if low or high else NOT_SHOWN if self.unrun else MET


def _rates(runs: results.Runs) -> Iterator[Target]:
    """Images/s, as ratios of runs within an hour.

    A rival counts by the best of its ways, and nothing is met before all of them ran.
    """

    def ratio(ours: str, rival: str) -> float | None:
        return results.paired(runs.get(ours, []), runs.get(rival, []), "images_per_second")

    def against(shown: str, ours: str, rival: str, least: float | None = None) -> Target:
        ratios = {way: ratio(ours, way) for way in throughput.ways(rival)}
        ran = [found for found in ratios.values() if found]
        unrun = [way for way, found in ratios.items() if not found]
        unrun += [f"{name} over 10,000 images" for name in (ours, *ratios) if _is_short(name, runs)]
        return Target(shown, min(ran, default=None), least, unrun=tuple(unrun))

    def allowed(job: str, function: str) -> float | None:
        """The median of a job's share, each run against the ceilings nearest in time."""
        shares = []
        for mine in runs.get(job, []):
            alone = [results.nearest(mine, runs.get(name, [])) for name in ("decode", function)]
            seconds = sum(one["cpu_ms"] for one in alone if one) / 1000
            if all(alone):
                shares.append(mine["images_per_second"] * seconds / mine["of"]["cores"])
        return statistics.median(shares) if shares else None

    for short, name in _PRECISIONS:
        mine = f"ours_{short}"
        yield against(f"{name} / rival (a), same pixels", mine, f"tfdata_{short}", 1.05)
        cheapest = f"tfdata_{short}_cheapest"
        yield against(f"{name} / rival (a), cheapest", mine, cheapest, 1.05)
        for rival, theirs in (("same pixels", f"tfdata_{short}"), ("cheapest", cheapest)):
            shown = f"{name} by OpenVINO / rival (a), {rival}"
            yield against(shown, f"{mine}_openvino", theirs, 1.05)
    for by, mine in (("", "ours_bf16"), (" by OpenVINO", "ours_bf16_openvino")):
        yield against(f"bfloat16{by} / signature in float32", mine, "tfdata_signature", 1.8)
    for by, engine in (("", ""), (" by OpenVINO", "_openvino")):
        shown = f"float32{by} / rival (b)'s two passes"
        yield against(shown, f"ours_f32{engine}", "stock_two_passes", 3.5)
    yield against("bfloat16 / rival (b)'s two passes", "ours_bf16", "stock_two_passes")
    for short, name in _PRECISIONS:
        shown = f"cost of embedding + logits / embedding alone, {name}"
        yield Target(shown, ratio(f"ours_{short}_embedding", f"ours_{short}"), most=1.03, digits=3)
    for short, name in _PRECISIONS:
        for by, engine in (("", ""), (" by OpenVINO", "_openvino")):
            share = allowed(f"ours_{short}{engine}", f"bare_{short}{engine}")
            yield Target(f"{name}{by}, share of what the cores allow", share, 0.92, digits=3)
    for short, name in _PRECISIONS:
        shown, mine = f"function alone, {name}: ours by OpenVINO", f"bare_{short}_openvino"
        yield against(f"{shown} / by TensorFlow", mine, f"bare_{short}")
        yield against(f"{shown} / OpenVINO's", mine, f"openvino_{short}")
    for short, name in _PRECISIONS:
        shown = f"{name} by OpenVINO / decoding + OpenVINO"
        yield against(shown, f"ours_{short}_openvino", f"openvino_loop_{short}")
    for network in throughput.LARGE:
        for short, name, least in (("bf16", "bfloat16", 1.2), ("f32", "float32", None)):
            for by, engine in (("", ""), (" by OpenVINO", "_openvino")):
                mine, timm = f"{network}_{short}{engine}", f"timm_{network}_{short}"
                yield against(f"{network}, {name}{by} / timm", mine, timm, least)


def _is_short(name: str, runs: results.Runs) -> bool:
    """Whether what should run over many images has only run over fewer."""
    contender = throughput.CONTENDERS[name]
    images = results.median(runs.get(name, []), "images")
    return not contender.steady and images is not None and images < 10_000 * contender.share


def _starts(runs: results.Runs) -> Iterator[Target]:
    for network, most in startup.ALLOWED.items():
        beyond = results.median(startup.beyond(runs.get(network, [])), "seconds")
        shown = f"{network}: first row, seconds after TensorFlow's import"
        yield Target(shown, beyond, most=most, digits=1)


def _growths(runs: results.Runs) -> Iterator[Target]:
    """As ratios of runs within an hour: of memory the worst, of CPU time the median.

    Of runs of as many images as the lines say.
    """
    small, large, huge, many = growth.IMAGES
    sizes = {"base": growth.BASE, "small": small, "large": large, "huge": huge}
    runs = {
        name: [one for one in found if one["images"] == sizes.get(name, many)]
        for name, found in runs.items()
    }
    peak = results.median(runs.get("large", [])[-1:], "peak_mib")
    grown = results.worst(runs.get("large", []), runs.get("small", []), "peak_mib")
    yield Target("peak, 20,000 images / 2,000", grown, most=1.1)
    yield Target("peak at 20,000 images, the last, MiB (1.2 GB)", peak, most=1.2 * _GB, digits=0)
    costs = growth.costs(runs)
    for shown, more, fewer in (
        ("50,000 images / 2,000", "huge", "small"),
        ("500 shards / one", "500_shards", "one_shard"),
        ("many files / few TFRecords", "many_files", "few_records"),
    ):
        ratio = results.paired(costs.get(more, []), costs.get(fewer, []), "cpu_ms")
        yield Target(f"CPU time an image, {shown}", ratio, most=1.05)
    for shown, name in (
        ("one TFRecord file", "one_shard"),
        ("many files", "many_files"),
        ("50,000 images", "huge"),
    ):
        yield Target(
            f"share of the cores kept busy, {shown}",
            results.median(costs.get(name, []), "busy"),
            0.95,
        )


def _large_pictures(runs: results.Runs) -> Iterator[Target]:
    for side in large_pictures.SIDES:
        found = runs.get(str(side), [])
        times = results.median(found, "times")
        yield Target(f"12 megapixels to {side}, scaled decoding, times faster", times, 4, digits=1)
        levels = results.median(found, "mean_levels")
        yield Target(f"12 megapixels to {side}, mean difference in levels", levels, most=0.5)


def every(parts: Parts) -> list[Target]:
    """All targets, in one order whatever was measured; `parts` are one machine's."""
    return [
        *_rates(parts.get(throughput.PART, {})),
        *_starts(parts.get(startup.PART, {})),
        *_growths(parts.get(growth.PART, {})),
        *_large_pictures(parts.get(large_pictures.PART, {})),
    ]


def table(machines: Mapping[str, Parts]) -> str:
    """A line for each target that something was measured for, a column for each machine."""
    columns = [every(parts) for parts in machines.values()]
    rows = [
        f"| | wanted | {' | '.join(map(results.short, machines))} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    unrun: dict[str, None] = {}
    for line in zip(*columns, strict=True):
        if any(target.measured is not None for target in line):
            rows.append(f"| {line[0].shown} | {line[0].wanted} | {' | '.join(map(_cell, line))} |")
            doubtful = [target for target in line if target.verdict == NOT_SHOWN]
            unrun |= dict.fromkeys(name for target in doubtful for name in target.unrun)
    if unrun:
        rows += ["", f"?: what did not run there: {', '.join(unrun)}."]
    return "\n".join(rows)


def _cell(target: Target) -> str:
    if target.measured is None:
        return ""
    verdict = target.verdict
    shown = f"**{target.figure}**" if verdict == MISSED else target.figure
    return f"{shown} ?" if verdict == NOT_SHOWN else shown


def show(folder: Path) -> None:
    """Write the table of every machine."""
    results.show(folder, NAME, table(results.by_machine(folder)))


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    show(parser.parse_args().results)


if __name__ == "__main__":
    main()
