"""What a run will cost, before it is made.

    python -m pipeline.plan --images 1000000 --model nasnet_mobile --gpu nvidia-tesla-t4

Reckons from the figures of pipeline/figures.py; calls nothing and reads nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.catalog import HUB_MODELS, NETWORKS
from pipeline import figures
from pipeline.figures import PRICES, Figure
from pipeline.options import OneLineParser, byte_size, names_list, nearest_flag
from storage import stdio
from storage.errors import RequestError

_HOUR = 3600.0
_PRICE = "price_{}".format  # a price's flag
_GIB = float(1 << 30)
_GB = 1e9
_UNEVEN = 1.1  # times as long as in equal parts: from there on files are the bound


@dataclass(frozen=True)
class Model:
    """What a plan needs of a model: CPU seconds of one core, multiply-adds in billions (None: not
    known), widths of its vectors; `source` tells where the seconds are from."""

    cpu_seconds: float
    multiply_adds: float | None
    widths: dict[str, int]
    source: str


def whole(text: str) -> int:
    """A count, with or without `_` or a power of ten: `1_000_000`, `1e6`."""
    try:
        value = float(text)
        if value == int(value) and value >= 0:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no count; give such as 1000000 or 1e6")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = OneLineParser(
        prog="python -m pipeline.plan",
        usage="python -m pipeline.plan --images N --model M [flags]",
        description="Reckon time, workers, GPU hours, requests, output and price of a run. A table "
        "on stderr, one JSON object with every constant and its source as the last line of stdout. "
        "What was measured and what is assumed is told for each.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    add = result.add_argument
    add("--images", type=whole, required=True, metavar="N", help="how many, 1e6 too")
    add(
        "--model",
        required=True,
        metavar="M",
        help=f"{', '.join(NETWORKS)}, a hub handle of one, or any name with --cpu_seconds",
    )
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="as in the job")
    add(
        "--outputs",
        type=names_list(("embedding", "logits")),
        metavar="NAMES",
        help="vectors to write (default all that the model has)",
    )
    add(
        "--embedding_dtype", choices=("float32", "float16"), default="float32", help="as in the job"
    )
    add("--gpu", metavar="TYPE", help=f"{', '.join(figures.GPU_TERAFLOPS)}, or any with a speed")
    add("--vcpus", type=int, default=8, metavar="N", help="of a worker (default 8)")
    add("--workers", type=int, metavar="N", help="default: as many as --hours needs")
    add(
        "--hours",
        type=float,
        default=4.0,
        help="for the images alone, to reckon --workers from (default 4)",
    )
    add(
        "--images_per_file",
        type=whole,
        default=1,
        metavar="N",
        help="1 for image files, more in TFRecords, tars or Parquet (default 1)",
    )
    add("--store", choices=("gs", "s3"), default="gs", help="of input and output (default gs)")
    add("--image_bytes", type=byte_size, metavar="BYTES", help="mean, encoded (default 110000)")
    add("--decode_seconds", type=float, metavar="S", help="CPU seconds an image")
    add("--cpu_seconds", type=float, metavar="S", help="CPU seconds of the model an image")
    add("--widths", metavar="N,N", help="of embedding and logits, for a model that is not known")
    add("--gpu_images_per_second", type=float, metavar="R", help="of the model on one GPU")
    for name, price in PRICES.items():
        default = "listed by --gpu" if name == "gpu_hour" else price.value
        add(f"--price_{name}", type=float, metavar="USD", help=f"{price.unit} (default {default})")
    return result


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`argv` as a request. Raises RequestError, for a misspelt flag with the nearest one."""
    known, rest = parser().parse_known_args(argv)
    if rest:
        word = rest[0]
        if not word.startswith("--"):
            raise RequestError(f"{word}: belongs to no flag; see --help")
        name = word[2:].partition("=")[0]
        raise RequestError(f"--{name}: no such flag; {nearest_flag(name, vars(known))}")
    return known


def model_of(request: argparse.Namespace) -> Model:
    """What is known of the model asked for. Raises RequestError where that is too little."""
    name, head = request.model, "classification"
    if name in HUB_MODELS:
        name, head = HUB_MODELS[name].network.name, HUB_MODELS[name].head
    spec = NETWORKS.get(name)
    if request.widths:
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})?", request.widths):
            raise RequestError(f"--widths {request.widths}: one or two numbers, as in 1056,1001")
        widths = dict(
            zip(("embedding", "logits"), map(int, request.widths.split(",")), strict=False)
        )
    elif spec:
        widths = {"embedding": spec.feature_width}
        if head == "classification":
            widths["logits"] = spec.num_classes
    else:
        raise RequestError(
            f"--model {request.model}: none of {', '.join(NETWORKS)}, so its speed and widths are "
            "not known; measure them and give --cpu_seconds and --widths"
        )
    size = figures.MULTIPLY_ADDS[name].value if spec else None
    if request.cpu_seconds is not None:
        return Model(request.cpu_seconds, size, widths, "--cpu_seconds")
    measured = figures.MODEL_SECONDS.get((name, request.precision))
    if measured:
        return Model(measured.value, size, widths, measured.source)
    if not spec or size is None:
        if request.gpu:  # whose own speed counts
            return Model(0.0, size, widths, "not known")
        raise RequestError(f"--model {request.model}: its speed is not known; give --cpu_seconds")
    like = name.replace("pnasnet", "nasnet")
    other = figures.MODEL_SECONDS[like, request.precision].value
    ratio = size / figures.MULTIPLY_ADDS[like].value
    return Model(other * ratio, size, widths, f"{like}'s, by multiply-adds; not measured")


def gpu_rate(request: argparse.Namespace, model: Model) -> Figure | None:
    """Images a second of the model on one GPU; None without one. RequestError where not known."""
    if not request.gpu:
        for flag in ("gpu_images_per_second", "price_gpu_hour"):
            if getattr(request, flag) is not None:
                raise RequestError(f"--{flag}: counts beside --gpu only, and a CPU is planned with")
        return None
    if request.gpu_images_per_second is not None:
        return Figure(request.gpu_images_per_second, "images/s", "--gpu_images_per_second")
    peak = figures.GPU_TERAFLOPS.get(request.gpu)
    if peak is None or model.multiply_adds is None:
        raise RequestError(
            f"--gpu {request.gpu}: the speed of {request.model} there is not known"
            f"{_meant(request.gpu)}; give --gpu_images_per_second"
        )
    if request.precision != "float32":
        raise RequestError(
            f"--precision {request.precision}: what it does on --gpu {request.gpu} is not known, "
            "only peaks in float32 are; leave it out, or give --gpu_images_per_second"
        )
    rate = peak.value * 1e12 * figures.GPU_SHARE.value / (model.multiply_adds * 2e9)
    return Figure(rate, "images/s", f"ASSUMED: {figures.GPU_SHARE.value:.0%} of the peak")


def _meant(gpu: str) -> str:
    """The listed type that ends as `gpu` does: `t4` and `nvidia-t4` mean nvidia-tesla-t4."""
    if gpu in figures.GPU_TERAFLOPS:
        return ""
    last = gpu.lower().rpartition("-")[2]
    near = [name for name in figures.GPU_TERAFLOPS if name.rpartition("-")[2] == last]
    return f" (did you mean {near[0]}?)" if near else ""


def reckon(request: argparse.Namespace) -> dict[str, Any]:
    """The plan that `request` asks for, as JSON holds it. Raises RequestError."""
    above_0 = ("images_per_file", "vcpus", "workers", "hours", "image_bytes")
    for flag in (*above_0, "gpu_images_per_second"):
        value = getattr(request, flag)
        if value is not None and not 0 < value < math.inf:
            raise RequestError(f"--{flag} {value}: must be more than 0, and a number")
    for flag in ("decode_seconds", "cpu_seconds", *map(_PRICE, PRICES)):
        value = getattr(request, flag)
        if value is not None and not 0 <= value < math.inf:
            raise RequestError(f"--{flag} {value}: must be 0 or more, and a number")
    images = request.images
    model = model_of(request)
    outputs = request.outputs or tuple(model.widths)
    missing = [name for name in outputs if name not in model.widths]
    if missing:
        raise RequestError(f"--outputs {','.join(missing)}: the model has no such vector")
    decode = figures.DECODE_SECONDS.value
    if request.decode_seconds is not None:
        decode = request.decode_seconds
    an_object = figures.S3_OBJECT_SECONDS if request.store == "s3" else figures.OBJECT_SECONDS
    opening = an_object.value / request.images_per_file
    around = decode + figures.OTHER_SECONDS.value + opening
    cores = request.vcpus * figures.VCPU.value
    on_gpu = gpu_rate(request, model)
    prices = _prices(request)
    speeds = {
        "one process a worker, which opens objects": figures.VCPU.value / opening,
        "vCPUs": cores / (around + (0.0 if on_gpu else model.cpu_seconds)),
        **({"GPU": on_gpu.value} if on_gpu else {}),
    }
    bound = min(speeds, key=lambda name: speeds[name])
    rate = speeds[bound]

    objects = -(-images // request.images_per_file)
    pages = -(-objects // int(figures.PAGE_OBJECTS.value))
    listing = 2 * pages * figures.PAGE_SECONDS.value  # the launcher's look, and the job's
    element = 2 if request.embedding_dtype == "float16" else 4
    row = figures.ROW_BYTES.value + element * sum(model.widths[name] for name in outputs)
    a_bundle = max(request.images_per_file, int(figures.UNIT_IMAGES.value))
    a_file = min(
        a_bundle,
        figures.FILE_BYTES.value / row,
        figures.FILE_SECONDS.value * rate / figures.THREADS.value,
    )
    parts = math.ceil(images / max(a_file, 1))

    commit = commit_seconds(images, parts)
    fixed = listing + figures.START_SECONDS.value + figures.LOAD_SECONDS.value + commit
    workers, work, warnings = shared_out(request, rate)
    bound = "files" if warnings else bound
    seconds = fixed + work
    worker_hours = workers * (seconds - listing / 2) / _HOUR

    requests = {
        "lists": 2 * pages + 3 * -(-parts // int(figures.PAGE_OBJECTS.value)),  # and the commit's
        "reads": int(objects * figures.READS_AN_OBJECT.value),
        "writes": parts + 2,
    }
    gib = request.vcpus * figures.VCPU_GIB.value
    usd = {
        "vcpus": worker_hours * request.vcpus * prices["vcpu_hour"],
        "memory": worker_hours * gib * prices["gib_hour"],
        "gpus": worker_hours * prices["gpu_hour"] if on_gpu else 0.0,
        "requests": (requests["lists"] + requests["writes"]) / 1000 * prices["class_a"]
        + requests["reads"] / 1000 * prices["class_b"],
    }
    return {
        "images": images,
        "model": request.model,
        "precision": request.precision,
        "hours": round(seconds / _HOUR, 3),
        "workers": workers,
        "worker_hours": round(worker_hours, 2),
        "vcpu_hours": round(worker_hours * request.vcpus, 1),
        "gpu_hours": round(worker_hours if on_gpu else 0.0, 2),
        "images_per_second": round(images / work if work else rate * workers, 1),
        "images_per_second_per_worker": round(rate, 1),
        "bound_by": bound,
        "vcpus_to_a_gpu": (
            math.ceil(on_gpu.value * around / figures.VCPU.value) if on_gpu else None
        ),
        "seconds": {
            "listing": round(listing, 1),
            "start": figures.START_SECONDS.value + figures.LOAD_SECONDS.value,
            "work": round(work, 1),
            "commit": round(commit, 1),
        },
        "input_bytes": images * (request.image_bytes or int(figures.IMAGE_BYTES.value)),
        "output_bytes": int(images * row),
        "output_files": parts,
        "manifest_bytes": int(parts * figures.MANIFEST_BYTES.value),
        "requests": requests,
        "usd": {**{k: round(v, 2) for k, v in usd.items()}, "run": round(sum(usd.values()), 2)},
        "usd_a_month": round(images * row / _GB * prices["gb_month"], 2),
        "warnings": warnings,
        "limits": limits(images, objects, parts, gib, request.store),
        "constants": constants(request, model, on_gpu, prices),
    }


def shared_out(request: argparse.Namespace, rate: float) -> tuple[int, float, list[str]]:
    """How many workers, the seconds that the busiest needs, and warnings where files bound them.

    A unit of work, a file of many images or a run of image files, is read by one worker.
    """
    a_unit, named = request.images_per_file, "a file"
    if a_unit == 1:
        a_unit = int(figures.UNIT_IMAGES.value)
        named = f"a unit of {a_unit} image files"
    units = -(-request.images // a_unit)
    in_time = request.hours * _HOUR * rate  # images that a worker can take on
    each = units if request.images <= in_time else in_time // a_unit
    workers = request.workers or max(1, math.ceil(units / max(1, each)))
    most = -(-units // workers)
    images = min(request.images, most * a_unit)
    warnings = []
    if not request.workers and images > in_time:
        warnings.append(
            f"--hours {request.hours:g} is too short: {named} is read by one worker, which takes "
            f"{images / rate / _HOUR:.2g} h; make smaller files"
        )
    elif request.workers and images * workers > _UNEVEN * request.images:
        warnings.append(
            f"{named} is read by one worker: of {units:,} the busiest of {_workers(workers)} has "
            f"{most:,}, and {max(0, workers - units):,} have none; make more files, or ask for "
            "fewer workers"
        )
    return workers, images / rate, warnings


def limits(images: int, objects: int, parts: int, gib: float, store: str) -> list[dict[str, Any]]:
    """What grows with the run and is held, or done, in one place, the first to be met first.

    `at` is how many times larger the run could be, in three digits; below 1 the limit is passed,
    None where the run has nothing of it.
    """
    hold = gib * _GIB / 2  # of one machine, with room for all else
    pages = objects / figures.PAGE_OBJECTS.value
    request = figures.REQUEST_SECONDS.value
    resume = figures.S3_RESUME_REQUESTS if store == "s3" else figures.RESUME_REQUESTS
    readers = figures.RESUME_READERS.value
    grows = [
        ("listing in memory", objects * figures.LISTED_BYTES.value, hold, "bytes"),
        ("listing, page by page", pages * figures.PAGE_SECONDS.value, 2 * _HOUR, "s"),
        ("files to resume", parts * resume.value * request / readers, 2 * _HOUR, "s"),
        ("small files, for a reader", parts * figures.READS_AN_OBJECT.value * request, _HOUR, "s"),
        ("commit time", commit_seconds(images, parts), 2 * _HOUR, "s"),
        ("keys in the commit", images * figures.KEY_BYTES.value, hold, "bytes"),
        ("keys of a resumed run", images * figures.RESUME_BYTES.value, hold, "bytes"),
        ("manifest", parts * figures.MANIFEST_BYTES.value, 1e9, "bytes"),
    ]
    told = [
        {
            "what": what,
            "value": round(value),
            "limit": round(limit),
            "unit": unit,
            "at": float(f"{limit / value:.3g}") if value else None,
        }
        for what, value, limit, unit in grows
    ]
    return sorted(told, key=lambda row: math.inf if row["at"] is None else row["at"])


def commit_seconds(images: int, parts: int) -> float:
    """How long the commit of `parts` files takes: keys are settled, the output is listed thrice."""
    pages = parts / figures.PAGE_OBJECTS.value
    settled = images * figures.KEY_SECONDS.value / figures.VCPU.value
    return settled + 3 * pages * figures.PAGE_SECONDS.value


def _prices(request: argparse.Namespace) -> dict[str, float]:
    listed = {name: price.value for name, price in PRICES.items()}
    if request.gpu and request.price_gpu_hour is None:
        if request.gpu not in figures.GPU_HOURS:
            raise RequestError(
                f"--gpu {request.gpu}: its price is not known, and no other's would be right"
                f"{_meant(request.gpu)}; give --price_gpu_hour"
            )
        listed["gpu_hour"] = figures.GPU_HOURS[request.gpu]
    told = {name: getattr(request, _PRICE(name)) for name in PRICES}
    return {name: listed[name] if price is None else price for name, price in told.items()}


def constants(
    request: argparse.Namespace, model: Model, on_gpu: Figure | None, prices: dict[str, float]
) -> dict[str, Any]:
    """Every number that a plan went by, with its unit and source."""
    named = {
        name.lower(): value.described()
        for name, value in vars(figures).items()
        if isinstance(value, Figure)
    }
    if on_gpu:
        named["gpu_images_per_second"] = on_gpu.described()
    else:
        named["model_seconds"] = Figure(model.cpu_seconds, "CPU s/image", model.source).described()
    for name, price in prices.items():
        told = getattr(request, _PRICE(name)) is not None
        source = "told by its flag" if told else PRICES[name].source
        named[f"price_{name}"] = Figure(price, PRICES[name].unit, source).described()
    return named


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count:,} workers"


def table(plan: dict[str, Any]) -> str:
    """`plan` for people."""
    rows = [
        ("images", f"{plan['images']:,}"),
        (
            "time",
            f"{plan['hours']:.2f} h with {_workers(plan['workers'])}, bound by {plan['bound_by']}",
        ),
        ("speed", f"{plan['images_per_second_per_worker']:,} images/s a worker"),
        ("vCPU hours", f"{plan['vcpu_hours']:,}"),
        ("GPU hours", f"{plan['gpu_hours']:,}"),
        *(
            [("vCPUs to a GPU", f"{plan['vcpus_to_a_gpu']} would keep one busy")]
            if plan["vcpus_to_a_gpu"]
            else []
        ),
        ("input", f"{plan['input_bytes'] / _GB:,.1f} GB"),
        ("output", f"{plan['output_bytes'] / _GB:,.1f} GB in {plan['output_files']:,} files"),
        ("requests", ", ".join(f"{n:,} {name}" for name, n in plan["requests"].items())),
        ("price", f"{plan['usd']['run']:,.2f} USD, and {plan['usd_a_month']:,.2f} a month to keep"),
    ]
    lines = [f"{name:16}{text}" for name, text in rows]
    lines += [f"{'warning':16}{text}" for text in plan["warnings"]]
    lines += ["", "limits, the first to be met first (how many times larger a run could be)"]
    for row in plan["limits"]:
        if row["at"] is not None:
            passed = "  PASSED" if row["at"] < 1 else ""
            lines.append(f"  {row['what']:26}{row['at']:>12,}{passed}")
    assumed = [n for n, c in plan["constants"].items() if c["source"].startswith("ASSUMED")]
    lines += ["", f"assumed, not measured: {', '.join(assumed)}"]
    return "\n".join(lines)


def scale_table() -> str:
    """What the sizes of docs/SCALE.md cost, in Markdown."""
    rows = [
        "| images | model | on | a file holds | workers | hours | GPU hours | output | requests "
        "| USD | first limit, and how far |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for images in ("1e6", "1e8", "1e10"):
        for model, on, per_file in _SCALE_CASES:
            words = ["--images", images, "--model", model, "--images_per_file", per_file]
            words += ["--precision", "bfloat16"] if on is None else ["--gpu", on]
            plan = reckon(parser().parse_args([*words, "--hours", "24"]))
            first = plan["limits"][0]
            rows.append(
                f"| {plan['images']:,} | {model} | {on or 'CPUs, bfloat16'} | {per_file} "
                f"| {plan['workers']:,} | {plan['hours']:,.1f} | {plan['gpu_hours']:,.1f} "
                f"| {plan['output_bytes'] / _GB:,.0f} GB | {sum(plan['requests'].values()):,} "
                f"| {plan['usd']['run']:,.2f} | {first['what']}: x {first['at']:g} |"
            )
    return "\n".join(rows)


_SCALE_CASES = (
    ("nasnet_mobile", None, "1"),
    ("nasnet_mobile", "nvidia-tesla-t4", "5000"),
    ("nasnet_large", "nvidia-l4", "5000"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; returns the exit code: 0, or 2 where the request is wrong."""
    try:
        plan = reckon(parse(sys.argv[1:] if argv is None else argv))
        shown, line = table(plan), json.dumps(plan, allow_nan=False)
    except RequestError as error:
        stdio.tell_error(error)
        return 2
    except (OverflowError, ValueError):
        stdio.tell_error("a number that was given is too large, or too small, to reckon with")
        return 2
    stdio.tell(shown, "stderr")
    stdio.tell(line)
    return 0


if __name__ == "__main__":
    stdio.open_missing()
    sys.exit(main())
