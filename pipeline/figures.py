"""What a plan reckons with: figures that were measured, and what had to be assumed, each with its
source.

CPU seconds are of one core of an AMD EPYC (Zen 5), and include no waiting.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A number, its unit, and where it is from."""

    value: float
    unit: str
    source: str

    def described(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self._asdict()


_PERFORMANCE = "measured on a Zen 5: docs/MEASURED.md"
_ELSEWHERE = "CPUs without AMX or AMD's AVX-512 BF16 take as long as in float32"
_SPEC_SHEET = "peak of the vendor's data sheet"
_PRICE = "public list price, us-central1, noted 2025 and not looked up since; check it"

# Seconds of one core for an image: of images a second on two cores, two batches at once.
MODEL_SECONDS = {
    ("nasnet_mobile", "float32"): Figure(2 / 288, "CPU s/image", f"{_PERFORMANCE}, batch 8"),
    ("nasnet_mobile", "bfloat16"): Figure(2 / 379, "CPU s/image", f"{_PERFORMANCE}, {_ELSEWHERE}"),
    ("nasnet_large", "float32"): Figure(2 / 8.3, "CPU s/image", f"{_PERFORMANCE}, batch 1"),
    ("nasnet_large", "bfloat16"): Figure(2 / 16.0, "CPU s/image", f"{_PERFORMANCE}, {_ELSEWHERE}"),
    ("pnasnet_large", "float32"): Figure(2 / 8.25, "CPU s/image", f"{_PERFORMANCE}, batch 1"),
    ("pnasnet_large", "bfloat16"): Figure(2 / 15.7, "CPU s/image", f"{_PERFORMANCE}, {_ELSEWHERE}"),
}
# Multiply-adds of an image in billions, by which networks without a measurement are scaled.
MULTIPLY_ADDS = {
    "nasnet_mobile": Figure(0.564, "G", "NASNet's paper, arXiv:1707.07012, table 4"),
    "nasnet_large": Figure(23.8, "G", "NASNet's paper, arXiv:1707.07012, table 2"),
    "pnasnet_mobile": Figure(0.588, "G", "PNASNet's paper, arXiv:1712.00559, table 4"),
    "pnasnet_large": Figure(25.0, "G", "PNASNet's paper, arXiv:1712.00559, table 5"),
}
GPU_TERAFLOPS = {
    "nvidia-tesla-t4": Figure(8.1, "TFLOP/s float32", _SPEC_SHEET),
    "nvidia-l4": Figure(30.3, "TFLOP/s float32", _SPEC_SHEET),
    "nvidia-tesla-v100": Figure(14.0, "TFLOP/s float32", _SPEC_SHEET),
    "nvidia-tesla-a100": Figure(19.5, "TFLOP/s float32", _SPEC_SHEET),
}
GPU_SHARE = Figure(
    0.15,
    "of the peak",
    "ASSUMED: an H100 did 0.09 (nasnet_mobile) and 0.25 (nasnet_large) of its 67 TFLOP/s, "
    "docs/PERFORMANCE.md; no other GPU was measured; --gpu_images_per_second overrides it",
)
DECODE_SECONDS = Figure(
    0.0009,
    "CPU s/image",
    f"{_PERFORMANCE}, a 500 x 375 JPEG to 224 x 224 in a process of its own, resizing "
    "compiled (0.0015 by Pillow); 12 megapixels: 0.011",
)
OTHER_SECONDS = Figure(
    0.0002,
    "CPU s/image",
    "measured: the whole job on 3,000 local files, less decoding and a tiny model; rows of 59 "
    "numbers; under load",
)
OBJECT_SECONDS = Figure(
    0.0039,
    "CPU s/object",
    "measured: Google's client, 150 objects of 110 KB from a gs:// server on this machine, no TLS, "
    "under load; mostly Python, which one thread of a process runs at a time",
)
S3_OBJECT_SECONDS = Figure(
    0.010,
    "CPU s/object",
    "measured: boto3 behind Beam's s3://, process_time of 150 reads of 100 KB in turn, "
    "from moto's server in another process of this machine, no TLS; 0.256 before its client was "
    "shared",
)
VCPU = Figure(
    0.5, "cores", "ASSUMED: a cloud vCPU is a hyperthread, half of a core of the measured machine"
)
VCPU_GIB = Figure(3.75, "GiB", "n1-standard machines")
IMAGE_BYTES = Figure(110_000, "bytes", "mean of ImageNet's training set: 138 GB of 1.28 M JPEGs")
ROW_BYTES = Figure(300, "bytes", "transforms/sink.py: what a row holds besides its vectors")
START_SECONDS = Figure(300, "s", "ASSUMED: workers start, and pull an image of some GB")
LOAD_SECONDS = Figure(
    10,
    "s",
    "measured: docs/PERFORMANCE.md, process start to a prepared nasnet_large's first vectors, 5 s, "
    "at half the speed",
)

# Stores. Pages and their seconds are those of a service that was not measured.
PAGE_OBJECTS = Figure(1000, "objects", "both services' largest page; seen: tests/test_stores.py")
PAGE_SECONDS = Figure(0.1, "s", "ASSUMED: a page of a listing, one after the other")
REQUEST_SECONDS = Figure(0.05, "s", "ASSUMED: a small request, one after the other")
RESUME_REQUESTS = Figure(
    10.9, "requests/file", "counted on gs://: resuming.resume of 20 files, 4.4, and its commit"
)
S3_RESUME_REQUESTS = Figure(
    8.0, "requests/file", "counted on s3://: resuming.resume of 20 files, 3.2, and its commit"
)
RESUME_READERS = Figure(16, "files", "formats/parts.py: read at once")
READS_AN_OBJECT = Figure(2, "requests", "seen at gs:// and s3://: metadata, then the bytes")
FILE_BYTES = Figure(256 << 20, "bytes", "transforms/sink.py: where a file is closed")
FILE_SECONDS = Figure(60, "s", "transforms/sink.py: when a file is closed")
UNIT_IMAGES = Figure(128, "images", "formats/inputs.py: image files in a unit of work")
THREADS = Figure(4, "bundles", "pipeline/dataflow.py: at once on a worker")

# What the launcher or a single step holds.
LISTED_BYTES = Figure(276, "bytes/object", "measured: tracemalloc, 300,000 names of 60 characters")
KEY_BYTES = Figure(
    25, "bytes/row", "measured: tracemalloc, 1 M and 4 M keys: 16 of the digests, 9 to find repeats"
)
KEY_SECONDS = Figure(
    0.06e-6, "CPU s/row", "measured: benchmarks.keys, 0.6 CPU s for the commit of 10 M rows"
)
RESUME_BYTES = Figure(
    53,
    "bytes/row",
    "measured: benchmarks.keys, 506 MiB beyond imports for 10 M rows; of "
    "it 16 stay once sorted, or 32",
)
MANIFEST_BYTES = Figure(205, "bytes/file", "measured: json.dumps of an entry, indent 1")

GPU_HOURS = {
    "nvidia-tesla-t4": 0.35,
    "nvidia-l4": 0.56,
    "nvidia-tesla-v100": 2.48,
    "nvidia-tesla-a100": 2.93,
}
PRICES = {
    "vcpu_hour": Figure(0.056, "USD", f"Dataflow batch: {_PRICE}"),
    "gib_hour": Figure(0.003557, "USD", f"Dataflow batch: {_PRICE}"),
    "gpu_hour": Figure(0.35, "USD", f"Compute Engine's T4, or what GPU_HOURS has: {_PRICE}"),
    "class_a": Figure(0.005, "USD/1000 requests", f"Cloud Storage, lists and writes: {_PRICE}"),
    "class_b": Figure(0.0004, "USD/1000 requests", f"Cloud Storage, reads: {_PRICE}"),
    "gb_month": Figure(0.020, "USD", f"Cloud Storage, standard: {_PRICE}"),
}
