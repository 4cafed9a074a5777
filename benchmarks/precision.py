"""How far bfloat16 is from float32 on real photographs, for every network and vector.

    python -m benchmarks.precision --networks nasnet_mobile nasnet_large --engines tensorflow

Seeded weights, the photographs of the scikit-image package. Each network, precision and engine runs
in a process of its own; bfloat16 by either engine is held against TensorFlow's float32. cosine: the
least and the mean over the photographs. relative error: the largest |bfloat16 - float32| of a
photograph's vector over its largest |float32|, and the worst of all; and the length of the
difference over the length of the vector.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.processes import note
from benchmarks.throughput import Place
from models.runtime import BFLOAT16_KERNELS

PART = "precision"
NETWORKS = ("nasnet_mobile", "pnasnet_mobile", "nasnet_large", "pnasnet_large")
ENGINES = {"tensorflow": "", "openvino": ", by OpenVINO"}  # as the table shows them


def compare(fast: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Cosine and relative errors of `fast` against `exact`, both [N, width]."""
    fast, exact = fast.astype(np.float64), exact.astype(np.float64)
    lengths = np.linalg.norm(fast, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = (fast * exact).sum(1) / lengths
    apart = np.abs(fast - exact).max(1) / np.abs(exact).max(1)
    relative = np.linalg.norm(fast - exact, axis=1) / np.linalg.norm(exact, axis=1)
    same = float((fast.argmax(1) == exact.argmax(1)).mean())
    return {
        "least_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "largest_error": float(apart.max()),
        "relative_length": float(relative.max()),
        "same_largest": same,
        "photographs": len(exact),
    }


def vectors(model: str, precision: str, engine: str, file: str) -> None:
    """Write the vectors of all photographs by `model` to the .npz `file`."""
    from formats.image import Preprocessing, decode_image
    from models import loading, runtime
    from models.loading import LoadSpec, load
    from pipeline.demo import photographs

    loading.BFLOAT16 = runtime.BFLOAT16_KERNELS  # where it would be slower than float32, too
    loaded = load(LoadSpec(model, precision=precision, engine=engine))
    how = Preprocessing(loaded.info.image_size)
    pixels = np.stack([decode_image(data, how)[0] for _, data in photographs()])
    found = [loaded(pixels[at : at + 5]) for at in range(0, len(pixels), 5)]
    np.savez(file, **{name: np.concatenate([one[name] for one in found]) for name in found[0]})  # type: ignore[arg-type]


def _made(place: Place, network: str, precision: str, engine: str) -> Any:
    """What `vectors` writes, in a process of its own."""
    file = str(place.folder / f"{network}-{precision}-{engine}.npz")
    own = [sys.executable, "-m", "benchmarks.precision", "--vectors"]
    subprocess.run([*own, place.prepared(network), precision, engine, file], check=True)
    return np.load(file)


def table(runs: results.Runs) -> str:
    """What was measured, in Markdown."""
    rows = [
        "| network, vector | least cosine | mean cosine | largest error / largest value "
        "| length of the error / of the vector | same largest entry |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        last = found[-1]
        rows.append(
            f"| {name} | {last['least_cosine']:.5f} | {last['mean_cosine']:.5f} "
            f"| {last['largest_error']:.2%} | {last['relative_length']:.2%} "
            f"| {last['same_largest']:.0%} |"
        )
    every = [found[-1] for found in runs.values()]
    count = f"{every[-1]['photographs']} photographs. " if every else ""
    return "\n".join([*rows, "", count + results.caption(every)])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--engines", nargs="*", default=ENGINES, choices=ENGINES)
    parser.add_argument("--vectors", nargs=4, metavar=("MODEL", "PRECISION", "ENGINE", "FILE"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "benchmark")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="where docs/ lies")
    request = parser.parse_args()
    if request.vectors:
        return vectors(*request.vectors)
    if not BFLOAT16_KERNELS:
        parser.error("this CPU has no bfloat16: what it would compute is float32")
    place = Place(request.work)
    for network in request.networks:
        exact = _made(place, network, "float32", "tensorflow")
        for engine in request.engines:
            fast = _made(place, network, "bfloat16", engine)
            for name in exact:
                figures = compare(fast[name], exact[name])
                shown = f"{network}, {name}{ENGINES[engine]}"
                results.add(request.results, PART, shown, figures)
                note(f"{shown}: cosine {figures['least_cosine']:.5f}")
    results.show_each(request.results, PART, table)


if __name__ == "__main__":
    main()
