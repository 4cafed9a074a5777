"""Our function on a GPU: true float32, TF32, bfloat16 and XLA, by batches and lanes.

    python -m benchmarks.gpu --networks nasnet_mobile nasnet_large

From arrays to arrays, as the job calls it, on photographs in memory. Each line is a process of its
own, so that one that dies or takes too long costs no other its figures; its vectors are held
against this machine's CPU in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.bare import fixed_pictures, timed
from benchmarks.processes import note, run
from benchmarks.throughput import Place

PART = "gpu"
LIMIT = 120.0  # seconds for a line
_COMPARED = 16  # photographs
_ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1"}
_XLA = {"TF_XLA_FLAGS": "--tf_xla_auto_jit=2"}
ARITHMETIC: dict[str, Mapping[str, str]] = {
    "float32": {},
    "TF32": {},
    "bfloat16": {},
    "float32, XLA": _XLA,
    "bfloat16, XLA": _XLA,
}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=["nasnet_mobile", "nasnet_large"])
    parser.add_argument(
        "--arithmetic", nargs="*", choices=list(ARITHMETIC), default=list(ARITHMETIC)
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--lanes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    parser.add_argument("--any_device", action="store_true", help="go on where there is no GPU")
    parser.add_argument("--line", type=json.loads, help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.line:
        print(json.dumps(_line(request, **request.line)))
        return
    if not request.any_device and not Path("/dev/nvidiactl").exists():
        parser.error("no GPU here (no /dev/nvidiactl); --any_device goes on without")
    for network in request.networks:
        given = {"model": Place(request.work).prepared(network)}
        given["known"] = str(request.work / f"{network}-cpu.npz")
        _asked(given, _ON_CPU)
        for arithmetic, batch, lanes in itertools.product(
            request.arithmetic, request.batches, request.lanes
        ):
            name = f"{network}, {arithmetic}, {batch} x {lanes}"
            line = {**given, "arithmetic": arithmetic, "batch": batch, "lanes": lanes}
            try:
                told = _asked(line, ARITHMETIC[arithmetic])
            except RuntimeError as error:
                note(f"{name}: {error}")
                continue
            note(f"{name}: {told['images_per_second']:.0f} images/s")
            results.add(request.results, PART, name, told)
    results.show_each(request.results, PART, table)


def _asked(line: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """What a process of its own tells; RuntimeError where it fails or is killed at LIMIT."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--line", json.dumps(line)]
    return run(["env", *(f"{k}={v}" for k, v in environment.items()), *command], limit=LIMIT)


def _line(
    request: argparse.Namespace,
    model: str,
    known: str,
    arithmetic: str | None = None,
    batch: int = 4,
    lanes: int = 1,
) -> dict[str, Any]:
    """Figures of one line; without `arithmetic` the vectors that the others are held against."""
    from models.loading import LoadSpec, has_gpu, load
    from models.runtime import GPUS, tf

    if arithmetic and not has_gpu() and not request.any_device:
        sys.exit("TensorFlow sees no GPU here; --any_device goes on without")
    tf.config.experimental.enable_tensor_float_32_execution(arithmetic == "TF32")
    start = time.perf_counter()
    precision = "bfloat16" if arithmetic and "bfloat16" in arithmetic else "float32"
    function = load(LoadSpec(model, precision=precision, copies=lanes))
    loaded = time.perf_counter()
    pictures = fixed_pictures(_COMPARED, function.info.image_size)
    pixels = np.concatenate([pictures] * -(-batch // _COMPARED))[:batch]
    first = time.perf_counter()
    function(pixels)
    ready = loaded - start + time.perf_counter() - first
    parts = [function(pictures[at : at + batch]) for at in range(0, _COMPARED, batch)]
    vectors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not arithmetic:
        np.savez(known, **vectors)  # type: ignore[arg-type]
        return {}
    right = np.load(known)
    off = max(float(abs(v - right[k]).max() / abs(right[k]).max()) for k, v in vectors.items())
    pool = ThreadPoolExecutor(lanes)

    def several(count: int) -> int:
        return sum(pool.map(lambda _: len(next(iter(function(pixels).values()))), range(count)))

    steady = timed(several, request, lanes)
    memory = tf.config.experimental.get_memory_info("GPU:0")["peak"] if GPUS else None
    return {
        "images_per_second": steady["images"] / steady["steady_seconds"],
        "ready": ready,
        "off": off,
        "gpu_mib": memory and memory / (1 << 20),
        "gpu": tf.config.experimental.get_device_details(GPUS[0])["device_name"] if GPUS else None,
    }


def table(runs: results.Runs) -> str:
    """Every line that has run."""
    rows = [
        "| network, arithmetic, batch x lanes | images/s | largest error / largest value "
        "| load and first call, s | GPU memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        off = max(one["off"] for one in found)
        rows.append(
            f"| {name} | {results.spread(found, 'images_per_second')} | {off:.1e} "
            f"| {results.spread(found, 'ready', 1)} | {results.spread(found, 'gpu_mib')} |"
        )
    every = [one for found in runs.values() for one in found]
    devices = ", ".join(sorted({one["gpu"] for one in every if one["gpu"]}))
    return "\n".join([*rows, "", f"{devices or 'No GPU'}. {results.caption(every)}"])


if __name__ == "__main__":
    main()
