"""Rival: timm's nasnetalarge and pnasnet5large on PyTorch, pixels in memory, random weights.

    python -m benchmarks.rival_timm --network nasnetalarge --precision bfloat16 --seconds 20

channels_last, torch.inference_mode. `--way`: script, TorchScript traced and frozen, which folds
batch norms; eager, as timm makes it; compile, torch.compile with Inductor's freezing (needs a C++
compiler and minutes). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.bare import timed


def main() -> None:
    """Run and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="nasnetalarge")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--side", type=int, default=331)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lanes", type=int, default=1, help="batches at once, sharing the cores")
    parser.add_argument("--threads", type=int, default=0, help="of one operation; 0: cores")
    parser.add_argument("--way", choices=("script", "eager", "compile"), default="script")
    parser.add_argument("--seconds", type=float, default=20)
    request = parser.parse_args()
    import timm
    import torch
    import torch._inductor.config

    if request.threads:
        torch.set_num_threads(request.threads)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[request.precision]
    torch.manual_seed(0)
    model = timm.create_model(request.network, pretrained=False).eval().to(kind)
    model = model.to(memory_format=torch.channels_last)
    pictures = torch.rand(request.batch, 3, request.side, request.side, dtype=kind)
    pictures = pictures.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        if request.way == "script":
            model = torch.jit.freeze(torch.jit.trace(model, pictures))
        elif request.way == "compile":
            torch._inductor.config.freezing = True
            model = torch.compile(model)

        def once(_: Any) -> int:
            with torch.inference_mode():
                return len(model(pictures))

        def several(count: int) -> int:
            with ThreadPoolExecutor(request.lanes) as lanes:
                return sum(lanes.map(once, range(count)))

        print(json.dumps(timed(several, request)))


if __name__ == "__main__":
    main()
