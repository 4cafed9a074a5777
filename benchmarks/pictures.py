"""Real photographs as TFRecords of 500 x 375 JPEGs, the benchmarks' input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from formats.example import serialize_example
from formats.tfrecord import write_record
from pipeline.demo import photographs

SIZE = (500, 375)
DISTINCT = 250  # crops; records repeat them in turn


def crops() -> list[bytes]:
    """`DISTINCT` crops of the photographs, 500 x 375 pixels, as JPEG of quality 90."""
    random = np.random.default_rng(0)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in photographs()]
    made = []
    for number in range(DISTINCT):
        image = images[number % len(images)]
        width = random.uniform(0.5, 1.0) * min(image.width, image.height * 4 / 3)
        height = width * 3 / 4
        left = random.uniform(0, image.width - width)
        top = random.uniform(0, image.height - height)
        crop = image.resize(SIZE, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def write_records(folder: Path, images: int, shards: int) -> str:
    """`images` examples in `shards` TFRecord files below `folder`; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / f"photos-{images}-?????-of-{shards:05}")
    names = [str(folder / f"photos-{images}-{i:05}-of-{shards:05}") for i in range(shards)]
    if all(Path(name).exists() for name in names):
        return pattern
    made = crops()
    streams = [open(name, "wb") for name in names]  # noqa: SIM115
    for number in range(images):
        features = {"image/encoded": made[number % DISTINCT], "image/class/label": number}
        write_record(streams[number % shards], serialize_example(features))
    for stream in streams:
        stream.close()
    return pattern
