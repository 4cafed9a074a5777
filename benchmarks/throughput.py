"""Ours against the rivals, in turn, on the same pictures and weights.

    python -m benchmarks.throughput --only 'ours_*' 'tfdata_*' --repeat 2
    python -m benchmarks.throughput --only '*bf16*' --cores_each 2    # on a machine of many cores

Each contender runs as a process of its own. A loop runs over a small and a large input, and what
counts is the marginal cost between the two, so that start-up does not; a bare function runs on
pixels in memory after warming up. Every run is added to docs/performance.json at once, and the
tables in docs/ are made of all that stands there; parts can be run in any order.
With `--cores_each` as many contenders run at once as there are cores for, each on its own.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import frozen, results
from benchmarks.pictures import write_files, write_records
from benchmarks.processes import note, run
from formats.records import digest

PART = "throughput"


@functools.cache
def _source() -> str:
    """Eight characters that stand for the code that makes models: what older code made is left."""
    code = [*sorted((results.ROOT / "models").glob("*.py")), Path(frozen.__file__)]
    return digest(b"".join(path.read_bytes() for path in code))[:8]


@dataclass(frozen=True)
class Place:
    """Where models, frozen graphs and output lie, below `folder`; made when asked for."""

    folder: Path
    into: str = "output"

    def _made(self, name: str, *command: str) -> str:
        path = self.folder / f"{name}-{_source()}"
        if not path.exists():
            note(f"making {name}")
            scratch = self.folder / f".{path.name}"
            shutil.rmtree(scratch, ignore_errors=True)
            subprocess.run([sys.executable, "-m", *command, str(scratch)], check=True)
            scratch.rename(path)
        return str(path)

    def model(self, network: str = "nasnet_mobile", head: str = "classification") -> str:
        """A TF2 SavedModel with seeded weights, the same for both heads."""
        export = ("pipeline.models", "export", "--network", network, "--head", head)
        rest = ("--format", "saved_model", "--seed", "0", "--output")
        return self._made(f"{network}-{head}", *export, *rest)

    def prepared(self, network: str = "nasnet_mobile") -> str:
        """The classification model, prepared."""
        model = self.model(network)
        return self._made(f"{network}-prepared", "pipeline.models", "prepare", model, "--output")

    def frozen(self) -> str:
        """nasnet_mobile as rival (a) freezes it, for other engines."""
        model = self.model()
        return self._made("nasnet_mobile.pb", "benchmarks.frozen", "--model", model, "--output")

    @property
    def output(self) -> Path:
        """Where the job writes."""
        return self.folder / self.into


Command = Callable[[Place, str], list[str]]


@dataclass(frozen=True)
class Contender:
    """`shown`: in the table. `command`: of a place and a pattern of TFRecords.

    `steady`: it times itself on pixels in memory. `share`: of the images between small and large.
    `first`: flags of a short run that tells when the first row could be read in a file. `files`:
    its pictures lie in files of their own. `way_of`: what it is another way of doing; a rival
    counts by the best of its ways.
    """

    shown: str
    command: Command
    steady: bool = False
    share: float = 1.0
    first: tuple[str, ...] = ()
    files: bool = False
    way_of: str | None = None


def ways(name: str) -> list[str]:
    """The contenders that do what `name` does, each in another way; itself first."""
    others = [other for other, contender in CONTENDERS.items() if contender.way_of == name]
    return [name, *others]


def _python(module: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", module, *flags]


def ours(*flags: str) -> Command:
    """The job as users run it, on a prepared model."""
    return lambda place, records: _python(
        "pipeline.extract",
        *("--input", records, "--model", place.prepared()),
        *([] if "null" in flags else ["--output", str(place.output)]),
        *flags,
    )


def tf_data(*flags: str) -> Command:
    """Rival (a), its graph frozen once."""
    return lambda place, records: _python(
        "benchmarks.rival_tfdata", "--records", records, "--frozen", place.frozen(), *flags
    )


def signature(*flags: str) -> Command:
    """Rival (a) by the signature of the SavedModel."""
    return lambda place, records: _python(
        "benchmarks.rival_tfdata", "--records", records, "--signature", place.model(), *flags
    )


def stock(*heads: str) -> Command:
    """Rival (b), a pass for each of `heads`."""
    return lambda place, records: _python(
        "benchmarks.rival_beam",
        *("--records", records, "--models", *(place.model(head=head) for head in heads)),
    )


def openvino(*flags: str) -> Command:
    """Rival (c): in a loop where it takes the records."""

    def command(place: Place, records: str) -> list[str]:
        given = ["--records", records] if "loop" in flags else []
        rest = [flag for flag in flags if flag != "loop"]
        return _python("benchmarks.rival_openvino", "--graph", place.frozen(), *given, *rest)

    return command


def timm(*flags: str) -> Command:
    """Rival (d)."""
    return lambda place, records: _python("benchmarks.rival_timm", *flags)


def bare(network: str, precision: str, *flags: str) -> Command:
    """(e): our function without the job."""
    return lambda place, records: _python(
        "benchmarks.bare",
        *("model", "--model", place.prepared(network), "--precision", precision, *flags),
    )


_FIRST = ("--limit", "16", "--rows_per_file", "8", "--if_exists", "overwrite")
_FAST = ("--precision", "bfloat16")
_OPENVINO = ("--engine", "openvino")
# Rival (a) is at its best in one of three ways: batches side by side, a thread each, two to a core;
# as many as there are cores and as small as ours; or one batch on all cores, which is TensorFlow's
# own choice of threads.
_LANES = ("--lanes", "2", "--intra", "1", "--batch")
_SMALL = ("--lanes", "1", "--intra", "1", "--batch")
LARGE = ("nasnet_large", "pnasnet_large")
_BOTH = ("classification", "feature_vector")


def _rival_a(
    name: str,
    shown: str,
    command: Callable[..., Command],
    many: str,
    small: str,
    one: str,
    *flags: str,
) -> dict[str, Contender]:
    """Rival (a) in each of its ways: batches of `many`, of `small`, and of `one` alone."""
    return {
        name: Contender(shown, command(*_LANES, many, *flags)),
        f"{name}_small": Contender(
            f"{shown}, small batches", command(*_SMALL, small, *flags), way_of=name
        ),
        f"{name}_plain": Contender(
            f"{shown}, one batch on all cores", command("--batch", one, *flags), way_of=name
        ),
    }


CONTENDERS: dict[str, Contender] = {
    "ours_bf16": Contender("ours, bfloat16", ours(*_FAST), first=_FIRST),
    **{
        name: contender
        for cheapest, pixels, given in (
            ("", "", ()),
            ("_cheapest", ", cheapest pixels", ("--pixels", "cheapest")),
        )
        for short, shown, sizes, flags in (
            ("bf16", "bfloat16", ("16", "16", "32"), _FAST),
            ("f32", "float32", ("32", "8", "64"), ()),
        )
        for name, contender in _rival_a(
            f"tfdata_{short}{cheapest}",
            f"tf.data + frozen, {shown}{pixels}",
            tf_data,
            *sizes,
            *flags,
            *given,
        ).items()
    },
    "tfdata_signature": Contender("tf.data + signature, float32", signature()),
    "tfdata_signature_lanes": Contender(
        "tf.data + signature, float32, batches side by side",
        signature(*_LANES, "32"),
        way_of="tfdata_signature",
    ),
    "tfdata_signature_small": Contender(
        "tf.data + signature, float32, small batches",
        signature(*_SMALL, "8"),
        way_of="tfdata_signature",
    ),
    "ours_f32": Contender("ours, float32", ours(), first=_FIRST),
    "ours_f32_openvino": Contender(
        "ours, float32, --engine openvino", ours(*_OPENVINO), first=_FIRST
    ),
    "ours_bf16_openvino": Contender(
        "ours, bfloat16, --engine openvino", ours(*_FAST, *_OPENVINO), first=_FIRST
    ),
    "ours_bf16_embedding": Contender(
        "ours, bfloat16, embedding alone", ours(*_FAST, "--outputs", "embedding")
    ),
    "ours_f32_embedding": Contender(
        "ours, float32, embedding alone", ours("--outputs", "embedding")
    ),
    "ours_f32_files": Contender("ours, float32, a file a picture", ours(), files=True),
    "stock_two_passes": Contender(
        "RunInference over hub.KerasLayer, two passes", stock(*_BOTH), share=0.2
    ),
    "bare_bf16": Contender(
        "our function alone, bfloat16", bare("nasnet_mobile", "bfloat16"), steady=True
    ),
    "bare_f32": Contender(
        "our function alone, float32", bare("nasnet_mobile", "float32"), steady=True
    ),
    "bare_bf16_openvino": Contender(
        "our function alone, bfloat16, by OpenVINO",
        bare("nasnet_mobile", "bfloat16", *_OPENVINO),
        steady=True,
    ),
    "bare_f32_openvino": Contender(
        "our function alone, float32, by OpenVINO",
        bare("nasnet_mobile", "float32", *_OPENVINO),
        steady=True,
    ),
    "decode": Contender(
        "our decoding alone",
        lambda place, records: _python("benchmarks.bare", "decode", "--records", records),
        steady=True,
    ),
    "openvino_bf16": Contender(
        "OpenVINO alone on the rival's graph, bfloat16",
        openvino("--precision", "bfloat16"),
        steady=True,
    ),
    "openvino_f32": Contender(
        "OpenVINO alone on the rival's graph, float32", openvino(), steady=True
    ),
    "openvino_loop_bf16": Contender(
        "decoding + OpenVINO, bfloat16", openvino("--precision", "bfloat16", "loop")
    ),
    "openvino_loop_f32": Contender("decoding + OpenVINO, float32", openvino("loop")),
    "stage_read": Contender(
        "ours to the end of reading", ours("--sink", "null", "--stop_after", "read")
    ),
    "stage_decode": Contender(
        "ours to the end of decoding", ours("--sink", "null", "--stop_after", "decode")
    ),
    "stage_infer_bf16": Contender("ours without writing, bfloat16", ours("--sink", "null", *_FAST)),
    "stage_infer_f32": Contender("ours without writing, float32", ours("--sink", "null")),
    **{
        f"{network}_{short}{engine}": Contender(
            f"{network}: our function alone, {precision}{', by OpenVINO' if flags else ''}",
            bare(network, precision, *flags),
            steady=True,
        )
        for network in LARGE
        for engine, flags in (("", ()), ("_openvino", _OPENVINO))
        for short, precision in (("bf16", "bfloat16"), ("f32", "float32"))
    },
    **{
        f"timm_{network}_{short}{way}": Contender(
            f"{network}: timm, {precision}{way.replace('_', ', ')}",
            timm("--network", name, "--precision", precision, *flags),
            steady=True,
            way_of=f"timm_{network}_{short}" if way else None,
        )
        for network, name in zip(LARGE, ("nasnetalarge", "pnasnet5large"), strict=True)
        for way, *flags in (
            ("",),
            ("_lanes", "--lanes", "2", "--threads", "1"),
            ("_eager", "--way", "eager"),
            ("_compile", "--way", "compile"),
        )
        for short, precision in (("bf16", "bfloat16"), ("f32", "float32"))
    },
}


def make(contender: Contender, place: Place, images: Sequence[int], shards: int) -> dict[int, str]:
    """The small and the large input of a contender, by their size; its models are made too.

    All is made beforehand, since nothing should be while others are measured.
    """
    small, large = images
    sizes = small, small + int(contender.share * (large - small))
    made = {
        size: write_files(place.folder, size)
        if contender.files
        else write_records(place.folder, size, shards)
        for size in sizes
    }
    contender.command(place, made[small])
    return made


def measure(
    contender: Contender,
    place: Place,
    images: Sequence[int],
    shards: int,
    prefix: Sequence[str] = (),
) -> dict[str, Any]:
    """One turn of a contender: images/s, CPU ms an image, peak MiB, seconds to the first row.

    `prefix` comes before its commands.
    """
    made = make(contender, place, images, shards)
    small_size, large_size = min(made), max(made)
    small = made[small_size]
    if contender.steady:
        told = run([*prefix, *contender.command(place, small)])
        return {
            "images_per_second": told["images"] / told["steady_seconds"],
            "cpu_ms": 1000 * told["steady_cpu"] / told["images"],
            "peak_mib": told["peak_mib"],
            "images": told["images"],
        }
    told = {}
    for size, records in made.items():
        shutil.rmtree(place.output, ignore_errors=True)
        told[size] = run([*prefix, *contender.command(place, records)])
        done = told[size]["images"] - told[size].get("failures", 0)  # which cost no pass of a model
        if done != size:
            raise RuntimeError(f"{contender.shown}: {done} images of {size}")
    first = told[small_size]["first"]
    if contender.first:
        command = [*prefix, *contender.command(place, small), *contender.first]
        shutil.rmtree(place.output, ignore_errors=True)
        first = run(command, watch=place.output / "features")["first"]
    more = {
        figure: told[large_size][figure] - told[small_size][figure]
        for figure in ("images", "seconds", "cpu")
    }
    if min(more.values()) <= 0:
        raise RuntimeError(
            f"{contender.shown}: {large_size} images cost no more than {small_size}; "
            "give --images further apart, on a quieter machine"
        )
    return {
        "images_per_second": more["images"] / more["seconds"],
        "cpu_ms": 1000 * more["cpu"] / more["images"],
        "peak_mib": told[large_size]["peak_mib"],
        "first": first,
        "small_seconds": told[small_size]["seconds"],
        "images": more["images"],
    }


def table(runs: results.Runs) -> str:
    """Every contender that has run."""
    rows = [
        "| | images/s | CPU ms an image | peak MiB | first row, s | runs of images |",
        "|---|---|---|---|---|---|",
    ]
    for name, contender in CONTENDERS.items():
        if found := runs.get(name):
            digits = 1 if (results.median(found, "images_per_second") or 0) < 50 else 0
            first = "-" if contender.steady else results.spread(found, "first", 1)
            rows.append(
                f"| {contender.shown} | {results.spread(found, 'images_per_second', digits)} "
                f"| {results.spread(found, 'cpu_ms', 2)} | {results.spread(found, 'peak_mib')} "
                f"| {first} | {len(found)} of {found[-1]['images']:.0f} |"
            )
    every = [one for name in CONTENDERS for one in runs.get(name, [])]
    return "\n".join([*rows, "", results.caption(every)])


_OVERVIEW = {
    "ours, float32": "ours_f32",
    "ours, float32, `--engine openvino`": "ours_f32_openvino",
    "ours, `--precision bfloat16`": "ours_bf16",
    "ours, `--precision bfloat16 --engine openvino`": "ours_bf16_openvino",
    "(a) tf.data + frozen graph, float32": "tfdata_f32",
    "(a) the same, cheapest pixels": "tfdata_f32_cheapest",
    "(a) tf.data + frozen graph, bfloat16": "tfdata_bf16",
    "(a) the same, cheapest pixels, bfloat16": "tfdata_bf16_cheapest",
    "(a) tf.data + signature, float32": "tfdata_signature",
    "(b) RunInference over hub.KerasLayer, two passes": "stock_two_passes",
}


def overview(machines: Mapping[str, Mapping[str, results.Runs]]) -> str:
    """Images/s of what users choose from, and of the rivals by the best of their ways; a column for
    each machine.
    """
    rows = [
        f"| images/s | {' | '.join(map(results.short, machines))} |",
        f"|---|{'---|' * len(machines)}",
    ]
    for shown, name in _OVERVIEW.items():
        cells = []
        for parts in machines.values():
            runs = parts.get(PART, {})
            found = [results.median(runs.get(way, []), "images_per_second") for way in ways(name)]
            rate = max((one for one in found if one), default=None)
            cells.append("" if rate is None else f"{rate:.0f}")
        rows.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(rows)


def stages(runs: results.Runs) -> str:
    """Where an image's CPU time goes, from runs that end earlier, and from parts run alone.

    By the runs nearest to the last that ended at decoding, and none more than an hour away:
    differences want runs that are near in time. Nothing where none ended there.
    """
    at = max((results.at(one) for one in runs.get("stage_decode", [])), default=None)
    if at is None:
        return ""

    def cpu(name: str) -> float | None:
        found = runs.get(name, [])
        near = [one for one in found if abs(results.at(one) - at) <= results.NEAR]
        return results.median(sorted(near, key=lambda one: abs(results.at(one) - at))[:1], "cpu_ms")

    rows = [
        "| CPU ms an image | bfloat16 | float32 |",
        "|---|---|---|",
    ]
    lines: list[tuple[str, Callable[[str], list[float | None]]]] = [
        ("reading and Beam around it", lambda p: [cpu("stage_read")]),
        ("decoding (alone: `decode`)", lambda p: [cpu("stage_decode"), cpu("stage_read")]),
        (
            "batching, model and rows (alone: `bare`)",
            lambda p: [cpu(f"stage_infer_{p}"), cpu("stage_decode")],
        ),
        ("Parquet, checksums, commit", lambda p: [cpu(f"ours_{p}"), cpu(f"stage_infer_{p}")]),
        ("in all", lambda p: [cpu(f"ours_{p}")]),
        ("decoding alone", lambda p: [cpu("decode")]),
        ("our function alone", lambda p: [cpu(f"bare_{p}")]),
    ]
    for shown, parts in lines:
        cells = []
        for precision in ("bf16", "f32"):
            more, *less = parts(precision)
            known = more is not None and None not in less
            cells.append(f"{more - sum(less):.2f}" if known else "-")  # type: ignore[operator, arg-type]
        rows.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(rows)


def show(folder: Path) -> None:
    """Write the tables of all that has been measured."""
    results.show_each(folder, PART, table)
    results.show_each(folder, PART, stages, "stages")
    results.show(folder, "overview", overview(results.by_machine(folder)))


def _has_bfloat16() -> bool:
    from models.runtime import BFLOAT16_KERNELS  # and TensorFlow, which nothing else here wants

    return BFLOAT16_KERNELS


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="names, or patterns of them")
    parser.add_argument("--images", type=int, nargs=2, default=(500, 10500))
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--cores_each", type=int, help="of a contender; as many run at once as there are cores for"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs of these")
    parser.add_argument("--list", action="store_true", help="the contenders' names, and no run")
    parser.add_argument("--make", action="store_true", help="inputs and models only, and no run")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    chosen = {
        name: contender
        for name, contender in CONTENDERS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in request.only)
    }
    if not chosen:
        parser.error(f"--only {' '.join(request.only)}: no contender has such a name; see --list")
    if request.list:
        print("\n".join(f"{name:24} {contender.shown}" for name, contender in chosen.items()))
        return
    left = [name for name in chosen if "bf16" in name]
    if left and not _has_bfloat16():
        note(f"left out, since this CPU has no bfloat16: {', '.join(left)}")
        for name in left:
            del chosen[name]
    place = Place(request.work)
    place.folder.mkdir(parents=True, exist_ok=True)
    for contender in chosen.values():
        make(contender, place, request.images, request.shards)
    if request.make:
        return
    cores = sorted(os.sched_getaffinity(0))
    each = request.cores_each or len(cores)
    shares = [cores[at : at + each] for at in range(0, len(cores) - each + 1, each)]
    if not shares:
        parser.error(f"--cores_each {each}: this process may run on {len(cores)} only")
    idle: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for share in shares:
        idle.put(share)
    lock = threading.Lock()
    failed: list[str] = []
    if request.fresh:
        results.forget(request.results, PART, chosen, each)

    def one(turn: int, name: str) -> None:
        share = idle.get()
        prefix = ["taskset", "--cpu-list", ",".join(map(str, share))] if request.cores_each else []
        apart = replace(place, into=f"output-{share[0]}")
        try:
            figures = measure(chosen[name], apart, request.images, request.shards, prefix)
        except RuntimeError as error:  # one rival's failure costs no other's figures
            note(f"{name}: {error}")
            failed.append(name)
            return
        finally:
            idle.put(share)
        with lock:
            results.add(request.results, PART, name, figures, len(share))
        rate, cpu = figures["images_per_second"], figures["cpu_ms"]
        note(f"{turn + 1}: {name}: {rate:.1f} images/s, CPU {cpu:.2f} ms an image")

    with ThreadPoolExecutor(len(shares)) as at_once:
        turns = [
            (turn, name)
            for turn in range(request.repeat)
            for name in list(chosen)[:: -1 if turn % 2 else 1]  # or one would always come first
        ]
        list(at_once.map(lambda turn_and_name: one(*turn_and_name), turns))
    show(request.results)
    if failed:
        sys.exit(f"no figure of {', '.join(failed)}")


if __name__ == "__main__":
    main()
