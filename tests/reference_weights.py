"""The rule by which the reference outputs in data/ were made: weights and images from a hash.

`*_expected.npz` and `*_endpoints.json` hold what TF-Slim's networks gave with these weights on
these images, in float32 on a CPU.
"""

from __future__ import annotations

import hashlib

import numpy as np

GAIN = {"conv": 1.0, "depthwise": 2.0, "pointwise": 1.0, "fc": 2.0}
IMAGES_SHA256 = {224: "f6fcd77558c1acaee7b2213ea9005ace16b60e78e8371f0bb6127587a9dd9ffb"}


def kind(name: str) -> str:
    *_, scope, leaf = ["", *name.split("/")]
    if leaf == "weights":
        return "fc" if scope == "FC" else "conv"
    return {
        "depthwise_weights": "depthwise",
        "pointwise_weights": "pointwise",
        "biases": "bias",
    }.get(leaf, leaf)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of the variable `name`."""
    what = kind(name)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    draw = np.random.Generator(np.random.PCG64(seed))
    if what in GAIN:
        fan_in = np.prod(shape[:2] if what == "depthwise" else shape[:-1])
        value = draw.standard_normal(shape) * np.sqrt(GAIN[what] / fan_in)
    elif what in ("gamma", "moving_variance"):
        value = draw.uniform(0.5, 1.5, shape)
    else:
        value = draw.standard_normal(shape) * (0.01 if what == "bias" else 0.1)
    return value.astype(np.float32)


def images(size: int) -> np.ndarray:
    """Two pictures of noise and two smooth ones, float32 [4, size, size, 3] in [0, 1]."""
    draw = np.random.Generator(np.random.PCG64(12345))
    noise = draw.integers(0, 256, size=(2, size, size, 3), dtype=np.uint8)
    smooth = np.empty((2, size, size, 3))
    y, x = np.mgrid[0:size, 0:size]
    for image in smooth:
        for channel in range(3):
            level = draw.uniform(0.2, 0.8)
            for _ in range(5):
                fy, fx = draw.uniform(-6, 6, 2)
                phase = draw.uniform(0, 2 * np.pi)
                amplitude = draw.uniform(0.05, 0.3)
                level += amplitude * np.sin(2 * np.pi * (fy * y / size + fx * x / size) + phase)
            image[..., channel] = level
    pixels = np.concatenate([noise, np.rint(255 * np.clip(smooth, 0, 1)).astype(np.uint8)])
    if size in IMAGES_SHA256:
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == IMAGES_SHA256[size]
    return pixels.astype(np.float32) / np.float32(255)
