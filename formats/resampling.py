"""Pillow's BILINEAR for pictures in mode RGB, to the last bit, and where it can some times as fast.

`_resampling.c` does the same sums with AVX2. It is compiled where the project is installed and a C
compiler is there; without it, and for what it leaves alone, Pillow resizes.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import PIL
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right and lower side, in pixels

# Which axis goes first decides the last bit, and has changed between Pillows: one that is not known
# here does all of it itself.
_PILLOW = "13.0."


def _load() -> tuple[ModuleType | None, str]:
    """The compiled half, or why there is none."""
    if not PIL.__version__.startswith(_PILLOW):
        return None, f"Pillow {PIL.__version__} resizes, whose order is not known here"
    try:
        return importlib.import_module("formats._resampling"), ""
    except ImportError as error:
        return None, f"Pillow resizes, in some times as long ({error})"


COMPILED, WHY_NOT = _load()


def resize_antialias(image: Image.Image, columns: int, rows: int, box: Box) -> np.ndarray:
    """The part `box` of `image` (mode RGB) as uint8 [rows, columns, 3], perhaps read-only.

    Equals image.resize((columns, rows), BILINEAR, box) to the bit: a triangle filter, widened where
    the part is larger than the result. Safe to call from several threads, and releases the GIL.
    """
    if COMPILED is None:
        return _by_pillow(image, columns, rows, box)
    try:
        _, pixels = image.__arrow_c_array__()
    except ValueError:  # it lies in pieces: Pillow takes memory in blocks of 16 MB
        return _by_pillow(image, columns, rows, box)
    y_first = _along_y_first(image.size, columns, rows)
    resized = COMPILED.resize(pixels, image.size, (columns, rows), box, y_first)
    return np.frombuffer(resized, np.uint8).reshape(rows, columns, 3)


def _by_pillow(image: Image.Image, columns: int, rows: int, box: Box) -> np.ndarray:
    return np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR, box=box))


def _along_y_first(size: tuple[int, int], columns: int, rows: int) -> bool:
    """Whether Pillow 13.0 begins with lines: where they lose more than twice what columns do."""
    width, height = size
    return height > rows and height - rows > 2 * (width - columns)
