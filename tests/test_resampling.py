"""formats/resampling.py and its compiled half, held to Pillow's bits."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from formats import resampling
from formats.resampling import COMPILED, resize_antialias

CPU = Path("/proc/cpuinfo")
COULD = (
    CPU.exists()
    and "avx2" in CPU.read_text().split()
    and shutil.which("gcc") is not None
    and Path(sysconfig.get_paths()["include"], "Python.h").exists()
)
compiled = pytest.mark.skipif(COMPILED is None, reason="resizing is not compiled here")
SIDES = st.integers(1, 60) | st.integers(1, 700)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Pixels of which the half are at the ends of the range, where sums are clipped."""
    values = np.random.default_rng(seed).integers(-128, 384, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def by_pillow(image: Image.Image, columns: int, rows: int, box: resampling.Box) -> np.ndarray:
    return np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, box=box))


@pytest.mark.skipif(not COULD, reason="no gcc, no Python.h or no AVX2 here")
def test_it_is_compiled_where_it_can_be():
    assert COMPILED is not None


@compiled
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_every_picture_has_pillows_bits(data):
    width, height, columns, rows = (data.draw(SIDES) for _ in range(4))
    box = (0.0, 0.0, float(width), float(height))
    if data.draw(st.booleans()):  # as scaled decoding and the fits take it, which round
        left, top = (data.draw(st.floats(0, side - 0.5, width=32)) for side in (width, height))
        least = [float(np.float32(start + 0.25)) for start in (left, top)]
        right, bottom = (
            data.draw(st.floats(low, side, width=32))
            for low, side in zip(least, (width, height), strict=True)
        )
        box = (left, top, right, bottom)
    image = noise(width, height, seed=width * height)
    resized = resize_antialias(image, columns, rows, box)
    assert np.array_equal(resized, by_pillow(image, columns, rows, box))


@compiled
@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [
        (500, 375, 224, 224),
        (333, 500, 224, 224),  # along y first
        (2, 20000, 8, 8),  # thousands of lines to one
        (20000, 1, 8, 8),
        (1, 1, 9, 7),
        (224, 224, 224, 224),
    ],
)
def test_shapes_of_their_own(width, height, columns, rows):
    image, box = noise(width, height), (0.0, 0.0, float(width), float(height))
    resized = resize_antialias(image, columns, rows, box)
    assert resized.shape == (rows, columns, 3)
    assert np.array_equal(resized, by_pillow(image, columns, rows, box))


@compiled
def test_which_axis_is_first_is_seen_in_the_bits(monkeypatch):
    image, box = noise(333, 500), (0.0, 0.0, 333.0, 500.0)
    monkeypatch.setattr(resampling, "_along_y_first", lambda *_: False)
    other = resize_antialias(image, 224, 224, box).astype(int)
    assert np.abs(other - by_pillow(image, 224, 224, box)).max() == 1


def test_a_picture_in_pieces_is_left_to_pillow():
    image, box = noise(2500, 1800), (0.0, 0.0, 2500.0, 1800.0)  # 18 MB, of blocks of 16
    with pytest.raises(ValueError, match="contiguous"):
        image.__arrow_c_array__()
    assert np.array_equal(resize_antialias(image, 8, 8, box), by_pillow(image, 8, 8, box))


def test_without_the_compiled_half_pillow_resizes(monkeypatch):
    monkeypatch.setattr(resampling, "COMPILED", None)
    image, box = noise(30, 20), (1.0, 2.0, 30.0, 20.0)
    assert np.array_equal(resize_antialias(image, 8, 8, box), by_pillow(image, 8, 8, box))


def test_a_pillow_of_unknown_order_resizes_itself(monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "13.1.0")
    assert resampling._load() == (None, "Pillow 13.1.0 resizes, whose order is not known here")


def test_what_is_not_compiled_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "formats._resampling", None)  # as Python marks what is missing
    found, why = resampling._load()
    assert found is None
    assert why.startswith("Pillow resizes, in some times as long (")


@compiled
def test_without_memory_it_says_so():
    text = """
import resource
from PIL import Image
from formats.resampling import COMPILED
image = Image.new("RGB", (2, 1000000))
_, pixels = image.__arrow_c_array__()
held = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (held + (400 << 20),) * 2)
try:
    COMPILED.resize(pixels, image.size, (200, 1), (0, 0, *image.size), False)
except MemoryError:
    print("MemoryError")
print(len(COMPILED.resize(pixels, image.size, (200, 1), (0, 0, *image.size), True)))
"""
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["MemoryError", "600"]


@compiled
def test_threads_do_not_meet():
    images = [noise(300 + seed, 200 + 3 * seed, seed) for seed in range(16)]

    def resized(image: Image.Image) -> bool:
        box = (0.0, 0.0, *map(float, image.size))
        mine = [resize_antialias(image, 97, 101, box) for _ in range(20)]
        return all(np.array_equal(one, by_pillow(image, 97, 101, box)) for one in mine)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(resized, images))


@compiled
@pytest.mark.parametrize(
    ("size", "target", "box"),
    [
        ((30, 21), (8, 8), (0, 0, 30, 21)),  # more pixels than there are
        ((10, 10), (8, 8), (0, 0, 10, 10)),
        ((-30, -20), (8, 8), (0, 0, 30, 20)),
        ((30, 20), (0, 8), (0, 0, 30, 20)),
        ((30, 20), (8, 1 << 25), (0, 0, 30, 20)),
        ((30, 20), (8, -8), (0, 0, 30, 20)),
        ((30, 20), (8, 8), (0, 0, 31, 20)),
        ((30, 20), (8, 8), (-1, 0, 30, 20)),
        ((30, 20), (8, 8), (0, 20, 30, 20)),
        ((30, 20), (8, 8), (0, 0, float("nan"), 20)),
    ],
)
def test_what_would_reach_beyond_memory_is_refused(size, target, box):
    _, pixels = noise(30, 20).__arrow_c_array__()
    assert len(COMPILED.resize(pixels, (30, 20), (8, 8), (0, 0, 30, 20), False)) == 8 * 8 * 3
    with pytest.raises(ValueError, match=r"outside the picture|not 30 x 21|not 10 x 10"):
        COMPILED.resize(pixels, size, target, box, False)


@compiled
def test_other_pixels_are_refused():
    _, grey = Image.new("L", (30, 20)).__arrow_c_array__()
    with pytest.raises(ValueError, match="not 30 x 20 pixels of four bytes"):
        COMPILED.resize(grey, (30, 20), (8, 8), (0, 0, 30, 20), False)
    with pytest.raises((ValueError, TypeError)):
        COMPILED.resize(b"", (30, 20), (8, 8), (0, 0, 30, 20), False)
    (schema, pixels) = noise(30, 20).__arrow_c_array__()
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        COMPILED.resize(schema, (30, 20), (8, 8), (0, 0, 30, 20), False)
    pa.Array._import_from_c_capsule(schema, pixels)
    with pytest.raises(ValueError, match="not 30 x 20 pixels"):  # they have gone to Arrow
        COMPILED.resize(pixels, (30, 20), (8, 8), (0, 0, 30, 20), False)
