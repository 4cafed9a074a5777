"""Encoded pictures to pixels: bytes -> uint8 [S, S, 3], with Pillow and NumPy.

`decode_image` is the whole of it: identify by the first bytes, refuse by the declared size, decode
strictly, turn upright, make RGB, fit to the square. The other functions are its steps.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from formats.records import ImageError, one_line
from formats.resampling import resize_antialias

FORMATS = ("jpeg", "png", "webp", "gif", "bmp")
MORE_FORMATS = ("tiff", "avif")
FITS = ("stretch", "slim", "cover", "pad")
FILTERS = ("antialias", "bilinear")
JPEG_SCALINGS = ("auto", "off")

CENTRAL_FRACTION = 0.875  # Slim's evaluation crop
DRAFT_MARGIN = 2  # a scaled JPEG stays at least this many times the target, both ways
LONGEST_SIDE = 1 << 20  # pixels: rows cost memory too, 1 x 8000000 takes 214 MB from 16 KB
_TILE = (ExifTags.Base.TileWidth, ExifTags.Base.TileLength)
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = (  # first column and row, and steps, of each pass of an interlaced PNG
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
_INFLATED = 1 << 20  # bytes at once
LONGEST_STRIP = 64  # short sides: what cover sees of a strip; 1 x 10000 would become 500 Mpx

# Texts and colour profiles of PNG, decompressed: real ones of print and of scanners have megabytes.
PngImagePlugin.MAX_TEXT_CHUNK = 8 << 20  # bytes of one
PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20  # bytes of a picture's texts

# The cap is ours, on every format and per call. Pillow's would only warn up to twice its limit, and
# its warnings and logs on odd metadata say nothing that the outcome does not.
Image.MAX_IMAGE_PIXELS = None
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as many pictures are decoded at once as there are cores
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Everything that decides the pixels of a picture, and which pictures have any.

    `size` is the side of the square in pixels; `fit`, `filter` and `jpeg_scaling` are told in
    `fit_image` and `open_rgb`; `formats` may be decoded (of `FORMATS` and `MORE_FORMATS`), up to
    `max_pixels` by the declared width x height (and `LONGEST_SIDE`). Raises ValueError for a value
    it does not know.
    """

    size: int
    fit: str = "stretch"
    filter: str = "antialias"
    jpeg_scaling: str = "auto"
    formats: tuple[str, ...] = FORMATS
    max_pixels: int = 89478485

    def __post_init__(self) -> None:
        for name, value, known in (
            ("fit", self.fit, FITS),
            ("filter", self.filter, FILTERS),
            ("jpeg_scaling", self.jpeg_scaling, JPEG_SCALINGS),
            *(("formats", name, FORMATS + MORE_FORMATS) for name in self.formats),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
        if self.size < 1 or self.max_pixels < 1:
            raise ValueError(f"size {self.size} and max_pixels {self.max_pixels} must be positive")

    @property
    def scales_jpeg(self) -> bool:
        """Whether large JPEGs are decoded at a fraction of their size."""
        return self.jpeg_scaling == "auto" and self.filter == "antialias"

    def describe(self) -> dict[str, Any]:
        """What was done to the pixels, for manifests: plain JSON values."""
        return {
            "size": self.size,
            "fit": self.fit,
            "filter": self.filter,
            "jpeg_scaling": "auto" if self.scales_jpeg else "off",
            "formats": list(self.formats),
            "max_pixels": self.max_pixels,
            "decoder": "pillow",
            "color": "RGB, colour profiles ignored",
            "alpha": "dropped",
            "deep_grey": "high byte",
            "orientation": "EXIF, applied before the fit",
            "frame": "first",
            "pixels": "uint8",
        }


@dataclass(frozen=True, slots=True)
class View:
    """Where a picture of `width` x `height` pixels lies in an image of it.

    The image shows it at one `scale`-th and from (`left`, `top`) on, in the image's pixels: JPEG's
    scaled decoding rounds sizes up, and the last column or row then is only partly the picture.
    """

    width: int
    height: int
    scale: int = 1
    left: float = 0
    top: float = 0


def decode_image(data: bytes, how: Preprocessing) -> tuple[np.ndarray, int, int]:
    """The picture in `data` as the model sees it.

    Returns pixels (uint8 [S, S, 3], RGB, C-contiguous, perhaps read-only) and the picture's own
    width and height after orientation. Raises nothing but ImageError, for every bad picture:
    EmptyImage, UnsupportedFormat, TooManyPixels (before its memory is taken) or CorruptImage.
    Safe to call from several threads.
    """
    try:
        image, view = open_rgb(data, how)
        return fit_image(image, how, view), view.width, view.height
    except ImageError:
        raise
    except Exception as error:  # Pillow raises more classes than it documents, and all are data
        text = f"{looks_like(data)}: {type(error).__name__}: {error}"
        raise ImageError("CorruptImage", one_line(text.removesuffix(": "))) from error


# ---------------------------------------------------------------- identify, by the first bytes

MAGIC: Mapping[str, tuple[bytes, ...]] = MappingProxyType(
    {
        "jpeg": (b"\xff\xd8",),
        "png": (b"\x89PNG",),
        "gif": (b"GIF87a", b"GIF89a"),
        "bmp": (b"BM",),
        "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
        "jp2": (b"\0\0\0\x0cjP  ",),
        "j2k": (b"\xff\x4f\xff\x51",),
        "jxl": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
        "ico": (b"\0\0\1\0", b"\0\0\2\0"),
        "dds": (b"DDS ",),
        "psd": (b"8BPS",),
        "qoi": (b"qoif",),
        "pnm": tuple(b"P%d%c" % (n, space) for n in range(1, 8) for space in b" \t\r\n"),
        "exr": (b"\x76\x2f\x31\x01",),
        "pdf": (b"%PDF-",),
        "gzip": (b"\x1f\x8b",),
        "zip": (b"PK\3\4",),
        "html, svg or xml": (b"<",),
    }
)


def looks_like(data: bytes) -> str | None:
    """The format that `data` begins like, whether or not it can be decoded; None: none known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        box = data[8 : min(int.from_bytes(data[:4], "big"), 512)]
        brands = {box[at : at + 4] for at in range(0, len(box), 4)}
        if brands & {b"avif", b"avis"}:
            return "avif"
        heif = brands & {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
        return "heif" if heif else "mp4"
    return next((name for name, magic in MAGIC.items() if data.startswith(magic)), None)


# ---------------------------------------------------------------- open


class _FirstFrameOfGif(GifImagePlugin.GifImageFile):
    """A GIF without what later frames need: Pillow would allocate their canvas while opening."""

    @property  # type: ignore[override]
    def dispose_extent(self) -> None:
        return None

    @dispose_extent.setter
    def dispose_extent(self, extent: tuple[int, int, int, int] | None) -> None:
        pass


# Classes instead of Image.open, which hides why a file cannot be identified behind an object's
# address, and knows no other class for GIF. An MPO's first picture is a plain JPEG.
OPENERS: Mapping[str, type[ImageFile.ImageFile]] = MappingProxyType(
    {
        "jpeg": JpegImagePlugin.JpegImageFile,
        "png": PngImagePlugin.PngImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
        "gif": _FirstFrameOfGif,
        "bmp": BmpImagePlugin.BmpImageFile,
        "tiff": TiffImagePlugin.TiffImageFile,
        "avif": AvifImagePlugin.AvifImageFile,
    }
)


def open_image(data: bytes, how: Preprocessing) -> ImageFile.ImageFile:
    """The picture in `data` with its header read and its pixels not, inside `how`'s limits.

    Raises ImageError (EmptyImage, UnsupportedFormat, TooManyPixels), or whatever Pillow raises.
    """
    if not data:
        raise ImageError("EmptyImage", "0 bytes")
    name = looks_like(data)
    if name not in how.formats or name not in OPENERS:
        seen = f"looks like {name}" if name else f"no known format, begins with {data[:8]!r}"
        raise ImageError("UnsupportedFormat", f"{seen}; allowed: {', '.join(how.formats)}")
    if name == "webp":  # its decoder takes the canvas's memory when it is opened
        _check_size(webp_size(data), how)
    image = OPENERS[name](BytesIO(data))
    _check_size(image.size, how)
    if name == "tiff":  # a tile is decoded whole, however little of it is the picture
        tags = getattr(image, "tag_v2", {})
        width, height = (tags.get(tag, 0) for tag in _TILE)
        _check_size((width, height), how)
    return image


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP file declares (RFC 9649, 2.5 to 2.7), without decoding.

    Raises ValueError or struct.error for a header that is none.
    """
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise ValueError(f"no WebP header, first chunk {kind!r}")


def _check_size(size: tuple[int, int], how: Preprocessing) -> None:
    width, height = size
    if max(width, height) > LONGEST_SIDE:
        raise ImageError("TooManyPixels", f"{width} x {height}: no side may exceed {LONGEST_SIDE}")
    if width * height > how.max_pixels:
        raise ImageError(
            "TooManyPixels",
            f"{width} x {height} = {width * height} pixels, the limit is {how.max_pixels}",
        )


# ---------------------------------------------------------------- decode, upright, in RGB

TURNS: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
SIDEWAYS = frozenset({5, 6, 7, 8})  # turns that swap width and height
RIGHT_TO_LEFT = frozenset({2, 3, 6, 7})  # turns that bring what was last in a row to its start
BOTTOM_TO_TOP = frozenset({3, 4, 7, 8})


def open_rgb(data: bytes, how: Preprocessing) -> tuple[Image.Image, View]:
    """The first picture in `data`, decoded, upright and in mode RGB, and where it lies in there.

    With `how.scales_jpeg` a JPEG that is large enough is decoded at 1/2, 1/4 or 1/8, at least twice
    what the fit will ask for in both directions. Raises as `open_image` does.
    """
    image = open_image(data, how)
    width, height = image.size
    scale = _scale_down(image, how) if how.scales_jpeg else 1
    _forget_xmp(image)  # a TIFF would be turned by it while it is loaded
    try:
        image.load()
        if isinstance(image, PngImagePlugin.PngImageFile):
            _check_png(data, image)
    except OSError:
        if scale == 1:
            raise
        return open_rgb(data, replace(how, jpeg_scaling="off"))  # a lossless JPEG knows no scale
    turn = orientation(image)
    rgb = to_rgb(image)
    if turn in TURNS:
        rgb = rgb.transpose(TURNS[turn])
    if scale == 1:
        return rgb, View(*rgb.size)
    if turn in SIDEWAYS:
        width, height = height, width
    left = rgb.width - width / scale if turn in RIGHT_TO_LEFT else 0
    top = rgb.height - height / scale if turn in BOTTOM_TO_TOP else 0
    return rgb, View(width, height, scale, left, top)


def _scale_down(image: ImageFile.ImageFile, how: Preprocessing) -> int:
    """Asks a JPEG that is not yet loaded for scaled decoding; the divisor: 1, 2, 4 or 8."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    width, height = image.size
    columns, rows = fitted_size(width, height, how)  # of a picture on its side: both swapped
    if how.fit == "slim":
        columns = rows = math.ceil(how.size / CENTRAL_FRACTION)
    drafted = image.draft(None, (DRAFT_MARGIN * columns, DRAFT_MARGIN * rows))
    return round(width / drafted[1][2]) if drafted else 1


def orientation(image: Image.Image) -> int:
    """EXIF orientation of `image`, 1 to 8; 1 where there is none or it cannot be read."""
    _forget_xmp(image)
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(turn) if turn in TURNS else 1
    except Exception:  # metadata is no reason to lose a picture
        return 1


def _forget_xmp(image: Image.Image) -> None:
    """Remove what Pillow would look for an orientation in where EXIF has none."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)


def _check_png(data: bytes, image: PngImagePlugin.PngImageFile) -> None:
    """OSError where the pixels of a loaded PNG end early: Pillow leaves what is missing black.

    They are inflated once more only where that may be so: the last row is black, or rows are
    interlaced (PNG, third edition, 4.5 and 8).
    """
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    last = image.crop((0, height - 1, width, height))
    if not interlaced and np.asarray(last).any():
        return
    bits = depth * _PNG_CHANNELS.get(color, 1)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sides = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    due = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sides if columns > 0)
    stream, found, at = zlib.decompressobj(), 0, 8
    while at + 8 <= len(data) and found < due:
        length, kind = struct.unpack_from(">I4s", data, at)
        more = data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        while more and found < due:
            found += len(stream.decompress(more, _INFLATED))
            more = stream.unconsumed_tail
        at += 12 + length
    if found < due:
        raise OSError(f"its pixels end after {found} of {due} bytes")


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode in mode RGB: alpha dropped, more than 8 bits by their high byte."""
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # else convert() would look for a colour to stand for it
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(image))
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """The grey values of an image in mode I;16*, I or F as uint8 [H, W].

    Integers count from 0 to what their bits hold, and negative ones as 0. Floats count from 0 to 1,
    or to where they reach beyond that.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # TIFF; elsewhere deep grey is 16 bits without sign
    # Of TIFFs in which 0 is white Pillow turns those of 8 bits around, and leaves these.
    white = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    if image.mode == "F":
        finite = values[np.isfinite(values)].astype(np.float64)
        low, high = finite.min(initial=0), finite.max(initial=1)
        values = np.nan_to_num(values.astype(np.float64), posinf=high, neginf=low).clip(low, high)
        grey = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
        return 255 - grey if white else grey
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    signed = tags.get(ExifTags.Base.SampleFormat, (1,))[0] == 2
    if signed:
        values = np.maximum(values, 0)
    elif bits == 32:
        values = values.view(np.uint32)
    grey = (values >> (bits - 8 - signed)).astype(np.uint8)
    return 255 - grey if white else grey


# ---------------------------------------------------------------- fit


def fit_image(image: Image.Image, how: Preprocessing, view: View | None = None) -> np.ndarray:
    """`image` (mode RGB) as uint8 [S, S, 3], C-contiguous, RGB in 0..255.

    stretch: the whole picture to S x S. slim: the central 87.5 % as tf.image.central_crop takes it,
    then stretch. cover: short side to S, centre S x S. pad: long side to S, centred on black.
    antialias is Pillow's BILINEAR, bilinear is `resize_bilinear`. `view` says where the picture
    lies in `image`, by default everywhere.
    """
    view = view or View(*image.size)
    left, top, width, height = _part_in_use(view.width, view.height, how)
    columns, rows = fitted_size(width, height, how)
    start_x, start_y = view.left + left / view.scale, view.top + top / view.scale
    end_x, end_y = start_x + width / view.scale, start_y + height / view.scale
    x, y = int(start_x), int(start_y)
    around = (x, y, math.ceil(end_x), math.ceil(end_y))
    if around != (0, 0, *image.size):  # a box alone would let the filter see what lies outside it
        image = image.crop(around)
    if how.filter == "bilinear":
        pixels = resize_bilinear(np.asarray(image), rows, columns)
    else:
        box = (start_x - x, start_y - y, end_x - x, end_y - y)
        pixels = resize_antialias(image, columns, rows, box)
    if how.fit == "cover":
        x, y = (columns - how.size) // 2, (rows - how.size) // 2
        return np.ascontiguousarray(pixels[y : y + how.size, x : x + how.size])
    if how.fit == "pad":
        x, y = (how.size - columns) // 2, (how.size - rows) // 2
        canvas = np.zeros((how.size, how.size, 3), np.uint8)
        canvas[y : y + rows, x : x + columns] = pixels
        return canvas
    return pixels


def _part_in_use(width: int, height: int, how: Preprocessing) -> tuple[int, int, int, int]:
    """Left, top, width and height of what the fit looks at, in the picture's pixels."""
    if how.fit == "slim":
        left, top = (int((side - side * CENTRAL_FRACTION) / 2) for side in (width, height))
    elif how.fit == "cover":
        most = LONGEST_STRIP * min(width, height)
        left, top = (max(0, side - most) // 2 for side in (width, height))
    else:
        left = top = 0
    return left, top, width - 2 * left, height - 2 * top


def fitted_size(width: int, height: int, how: Preprocessing) -> tuple[int, int]:
    """Width and height that a picture is resized to, before it is cropped or padded."""
    if how.fit not in ("cover", "pad"):
        return how.size, how.size
    side = min(width, height) if how.fit == "cover" else max(width, height)
    return max(1, round(width * how.size / side)), max(1, round(height * how.size / side))


def resize_bilinear(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """`array` (uint8 [H, W, C]) from two taps each way, as uint8 [height, width, C].

    rint(tf.image.resize(array, [height, width], "bilinear", antialias=False)) to the last bit:
    float32 throughout, half-pixel centres, along x first (tensorflow/core/kernels/image/
    resize_bilinear_op.cc). Only the rows and columns in use are read.
    """
    channels = array.shape[2]
    upper, lower, y = _taps(array.shape[0], height)
    left, right, x = _taps(array.shape[1], width)
    rows, place = np.unique(np.concatenate((upper, lower)), return_inverse=True)
    taken = array.take(rows, axis=0)
    lines = taken.take(right, axis=1).reshape(len(rows), -1).astype(np.float32)
    start = taken.take(left, axis=1).reshape(len(rows), -1)
    lines -= start
    lines *= np.repeat(x, channels)
    lines += start
    first = lines[place[:height]]
    result = lines[place[height:]]
    result -= first
    result *= y[:, None]
    result += first
    return np.rint(result, out=result).astype(np.uint8).reshape(height, width, channels)


def _taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` pixels the two of `size` around it, and how far along (float32)."""
    scale = np.float32(size) / np.float32(target)
    centre = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(centre)
    before = np.maximum(floor.astype(np.int64), 0)
    after = np.minimum(np.ceil(centre).astype(np.int64), size - 1)
    return before, after, centre - floor
