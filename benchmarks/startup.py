"""Process start to the first vectors: a prepared model against hub.load and a first call.

    python -m benchmarks.startup --model DIR --prepared DIR --repeat 3

Both as processes of their own, in turn; prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

HUB = """
import numpy as np, tensorflow as tf, tensorflow_hub as hub
loaded = hub.load({model!r})
loaded(tf.zeros([8, {side}, {side}, 3])).numpy()
"""
OURS = """
import numpy as np
from models.loading import LoadSpec, load
model = load(LoadSpec({prepared!r}))
model(np.zeros([8, {side}, {side}, 3], np.uint8))
"""
IMPORT = "import tensorflow"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prepared", required=True)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=3)
    request = parser.parse_args()
    seconds: dict[str, list[float]] = {"import tensorflow": [], "hub.load": [], "prepared": []}
    for _ in range(request.repeat):
        for name, code in zip(seconds, (IMPORT, HUB, OURS), strict=True):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code.format(**vars(request))],
                check=True,
                capture_output=True,
            )
            seconds[name].append(time.perf_counter() - start)
    print("| | seconds, median (least to most) |\n|---|---|")
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"| {name} | {middle:.1f} ({min(times):.1f} to {max(times):.1f}) |")


if __name__ == "__main__":
    main()
