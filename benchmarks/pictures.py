"""The benchmarks' input, made of the scikit-image package's photographs."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from formats.example import serialize_example
from formats.records import digest
from formats.tfrecord import write_record
from pipeline.demo import photographs

SIZE = (500, 375)
LARGE = (4000, 3000)  # 12 megapixels
DISTINCT = 250  # crops; an input repeats them in turn, each time with another comment


def _crops(size: tuple[int, int], count: int) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in photographs()]
    for number in range(count):
        image = images[number % len(images)]
        width = random.uniform(0.5, 1.0) * min(image.width, image.height * 4 / 3)
        height = width * 3 / 4
        left = random.uniform(0, image.width - width)
        top = random.uniform(0, image.height - height)
        crop = image.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=90)
        yield file.getvalue()


@functools.cache
def crops(count: int = DISTINCT) -> tuple[bytes, ...]:
    """`count` crops of the photographs, 500 x 375 pixels, as JPEG of quality 90."""
    return tuple(_crops(SIZE, count))


def commented(jpeg: bytes, number: int) -> bytes:
    """`jpeg` with `number` in a comment: the same picture, but other bytes.

    The job computes pictures of equal bytes once, which no rival does.
    """
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def _of_this_source(folder: Path) -> Path:
    """A folder below `folder`, made, for what this file makes as it is now."""
    made = folder / f"pictures-{digest(Path(__file__).read_bytes())[:8]}"
    made.mkdir(parents=True, exist_ok=True)
    return made


def large_photographs(count: int) -> list[bytes]:
    """`count` crops of 4000 x 3000 pixels, as JPEG of quality 90. They are enlarged, so smoother
    than a camera's, and a little cheaper to decode.
    """
    return list(_crops(LARGE, count))


def write_records(folder: Path, images: int, shards: int) -> str:
    """`images` examples in `shards` TFRecord files below `folder`; returns their pattern.

    Written once; later calls find them.
    """
    folder = _of_this_source(folder)
    pattern = str(folder / f"photos-{images}-?????-of-{shards:05}")
    names = [folder / f"photos-{images}-{i:05}-of-{shards:05}" for i in range(shards)]
    if all(name.exists() for name in names):
        return pattern
    made = crops()
    for shard, name in enumerate(names):
        scratch = name.with_name(f".{name.name}")
        with scratch.open("wb") as stream:
            for number in range(shard, images, shards):
                features = {
                    "image/encoded": commented(made[number % len(made)], number),
                    "image/class/label": number,
                }
                write_record(stream, serialize_example(features))
        scratch.rename(name)
    return pattern


def write_files(folder: Path, images: int) -> str:
    """`images` files in a folder below `folder`, 1,000 to a folder; returns the whole's path."""
    folder = _of_this_source(folder)
    whole = folder / f"files-{images}"
    if whole.exists():
        return str(whole)
    scratch = folder / f".files-{images}"
    for number in range(images):
        path = scratch / f"{number // 1000:04}" / f"{number:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(commented(crops()[number % DISTINCT], number))
    scratch.rename(whole)
    return str(whole)
