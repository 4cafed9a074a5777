"""formats/image.py against hand-made numbers, Pillow, TensorFlow and real damaged files."""

from __future__ import annotations

import csv
import json
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pictures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import (
    AvifImagePlugin,
    ExifTags,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from formats import image as module
from formats.image import (
    FILTERS,
    FITS,
    FORMATS,
    MORE_FORMATS,
    Preprocessing,
    decode_image,
    fit_image,
    looks_like,
    open_rgb,
    resize_bilinear,
)
from formats.records import MESSAGE_LIMIT, ImageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the module's filter

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "corpus"
EVERYTHING = FORMATS + MORE_FORMATS
GOOD = pictures.good()


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def exact(size: int, **options) -> Preprocessing:
    return Preprocessing(size, jpeg_scaling="off", **options)


def error_of(data: bytes, how: Preprocessing | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, how or Preprocessing(8))
    return caught.value


def grey(rows: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(rows, np.uint8)).convert("RGB")


# ---------------------------------------------------------------- golden numbers


def test_stretch_weighs_four_pixels_in_two_as_a_triangle():
    # Half-width 2 pixels: weights 3, 3, 1 of 7 from the near edge on.
    pixels = fit_image(grey([[0, 70, 140, 210]] * 4), Preprocessing(2))
    assert pixels.tolist() == [[[50] * 3, [160] * 3]] * 2


def test_bilinear_takes_two_taps_at_half_pixel_centres():
    up = resize_bilinear(np.array([[[0], [100]]], np.uint8), 1, 4)
    assert up.ravel().tolist() == [0, 25, 75, 100]
    down = resize_bilinear(np.arange(0, 180, 20, dtype=np.uint8)[None, :, None], 1, 3)
    assert down.ravel().tolist() == [20, 80, 140]  # the middle of each three, nothing averaged


@pytest.mark.parametrize("name", FILTERS)
def test_slim_sees_nothing_of_the_border(name):
    rows = np.full((16, 16), 255, np.uint8)
    rows[1:15, 1:15] = 100
    pixels = fit_image(grey(rows.tolist()), Preprocessing(5, fit="slim", filter=name))
    assert np.unique(pixels).tolist() == [100]


@pytest.mark.parametrize("name", FILTERS)
def test_cover_keeps_the_middle_of_the_long_side(name):
    how = Preprocessing(2, fit="cover", filter=name)
    assert fit_image(grey([[1, 2, 3, 4, 5, 6]] * 2), how)[..., 0].tolist() == [[3, 4], [3, 4]]
    assert fit_image(grey([[n] * 2 for n in range(1, 6)]), how)[..., 0].tolist() == [
        [2] * 2,
        [3] * 2,
    ]


@pytest.mark.parametrize("name", FILTERS)
def test_pad_centres_on_black(name):
    how = Preprocessing(4, fit="pad", filter=name)
    wide = fit_image(grey([[9, 9, 9, 9]] * 2), how)[..., 0]
    assert wide.tolist() == [[0] * 4, [9] * 4, [9] * 4, [0] * 4]
    thin = fit_image(grey([[9]] * 1000), how)[..., 0]
    assert thin.tolist() == [[0, 9, 0, 0]] * 4


# ---------------------------------------------------------------- equal to Pillow and TensorFlow


@pytest.mark.parametrize(
    ("width", "height"), [(50, 37), (37, 50), (9, 61), (61, 19), (20, 20), (224, 223)]
)
def test_antialias_is_pillow_to_the_last_bit(width, height):
    image, size = Image.fromarray(pictures.photo(width, height)), 24

    def resized(source: Image.Image, w: int, h: int) -> Image.Image:
        return source.resize((w, h), Image.Resampling.BILINEAR)

    left, top = int((width - width * 0.875) / 2), int((height - height * 0.875) / 2)
    central = image.crop((left, top, width - left, height - top))
    w, h = (round(side * size / min(width, height)) for side in (width, height))
    x, y = (w - size) // 2, (h - size) // 2
    covered = resized(image, w, h).crop((x, y, x + size, y + size))
    w, h = (round(side * size / max(width, height)) for side in (width, height))
    padded = Image.new("RGB", (size, size))
    padded.paste(resized(image, w, h), ((size - w) // 2, (size - h) // 2))
    expected = {
        "stretch": resized(image, size, size),
        "slim": resized(central, size, size),
        "cover": covered,
        "pad": padded,
    }
    for fit in FITS:
        np.testing.assert_array_equal(fit_image(image, Preprocessing(size, fit)), expected[fit])


@pytest.mark.parametrize("height", [1, 2, 3, 7, 64, 223, 225, 500])
@pytest.mark.parametrize("width", [1, 2, 17, 224, 333, 640])
def test_bilinear_is_tensorflow_to_the_last_bit(tf, width, height):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for h, w in ((224, 224), (1, 1), (7, 13), (331, 299), (height, 2 * width), (height, width)):
        other = tf.image.resize(array, [h, w], method="bilinear", antialias=False).numpy()
        mine = resize_bilinear(array, h, w)
        assert mine.dtype == np.uint8
        np.testing.assert_array_equal(mine, np.rint(other).astype(np.uint8))


def test_slim_crops_as_tensorflow_does(tf):
    for side in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 99, 100, 101, 331, 374, 375, 500):
        array = pictures.photo(side, side)
        central = tf.image.central_crop(array, 0.875).numpy()
        for name in FILTERS:  # resized to its own size, the crop is itself
            how = Preprocessing(len(central), fit="slim", filter=name)
            np.testing.assert_array_equal(fit_image(Image.fromarray(array), how), central)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_tensorflows(tf, mode, subsampling, progressive):
    for side in (1, 31, 224):
        data = pictures.jpeg(side, side, mode, subsampling=subsampling, progressive=progressive)
        other = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(decode_image(data, exact(side))[0], other)


@pytest.mark.parametrize(
    "data",
    [
        pictures.one_bit(),
        pictures.palette(),
        pictures.palette(transparency=3),
        pictures.palette(transparency=bytes(range(256))),
        pictures.deep_grey()[0],
        pictures.with_alpha("RGBA"),
        pictures.with_alpha("LA"),
        pictures.encode(Image.fromarray(pictures.photo()).convert("L"), "PNG", transparency=9),
        pictures.encode(pictures.photo(), "PNG", transparency=(1, 2, 3)),
    ],
    ids=["1", "P", "P-clear", "P-alphas", "I;16", "RGBA", "LA", "L-clear", "RGB-clear"],
)
def test_png_modes_are_tensorflows(tf, data):
    image, view = open_rgb(data, Preprocessing(8))
    assert (image.mode, view.width, view.height) == ("RGB", *image.size)
    np.testing.assert_array_equal(image, tf.io.decode_png(data, channels=3).numpy())


# ---------------------------------------------------------------- modes and formats


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_keeps_its_high_byte(kind):
    data, values = pictures.deep_grey(kind=kind)
    image, _ = open_rgb(data, Preprocessing(8, formats=EVERYTHING))
    np.testing.assert_array_equal(np.asarray(image)[..., 1], values >> 8)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[-5, 0, 1 << 30, 2**31 - 1]], np.int32), [0, 0, 128, 255]),
        (np.array([[0, 0.5, 1, np.nan]], np.float32), [0, 128, 255, 0]),
        (np.array([[-50, 0, 50, 205]], np.float32), [0, 50, 100, 255]),
        (np.array([[-3e38, 3e38, 0, np.inf]], np.float32), [0, 255, 128, 255]),
    ],
    ids=["int32", "unit floats", "other floats", "wide floats"],
)
def test_tiff_values_are_scaled_by_their_range(values, expected):
    data = pictures.encode(Image.fromarray(values), "TIFF")
    image, _ = open_rgb(data, Preprocessing(8, formats=EVERYTHING))
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_a_deep_tiff_in_which_zero_is_white():
    values = Image.fromarray(np.array([[0, 1, 90, 255]], np.uint16) << 8)
    data = pictures.encode(values, "TIFF", tiffinfo={ExifTags.Base.PhotometricInterpretation: 0})
    image, _ = open_rgb(data, Preprocessing(8, formats=EVERYTHING))
    assert np.asarray(image)[0, :, 0].tolist() == [255, 254, 165, 0]


def test_cmyk_is_converted_as_pillow_does():
    data = pictures.jpeg(24, 24, "CMYK")
    expected = Image.open(BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode_image(data, exact(24))[0], expected)


def test_the_first_picture_of_several_is_taken():
    expected = pictures.photo()
    for kind in ("PNG", "WEBP"):
        image, _ = open_rgb(pictures.animation(kind), Preprocessing(8))
        np.testing.assert_array_equal(image, expected)
    first = Image.fromarray(expected).convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB")
    np.testing.assert_array_equal(open_rgb(pictures.animation("GIF"), Preprocessing(8))[0], first)
    assert decode_image(pictures.mpo(), exact(9))[1:] == (40, 28)
    np.testing.assert_array_equal(
        open_rgb(pictures.mpo(), exact(8))[0], Image.open(BytesIO(pictures.mpo()))
    )


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", FILTERS)
def test_every_good_picture_fits_every_way(fit, name):
    for label, data in GOOD.items():
        pixels, width, height = decode_image(data, Preprocessing(17, fit, name))
        assert (pixels.shape, pixels.dtype) == ((17, 17, 3), np.uint8), label
        assert pixels.flags.c_contiguous, label
        assert Image.open(BytesIO(data)).size in ((width, height), (height, width)), label


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ("turn", "upright"),
    [
        (0, [[1, 2], [3, 4]]),
        (1, [[1, 2], [3, 4]]),
        (2, [[2, 1], [4, 3]]),
        (3, [[4, 3], [2, 1]]),
        (4, [[3, 4], [1, 2]]),
        (5, [[1, 3], [2, 4]]),
        (6, [[3, 1], [4, 2]]),
        (7, [[4, 2], [3, 1]]),
        (8, [[2, 4], [1, 3]]),
        (9, [[1, 2], [3, 4]]),
        (65535, [[1, 2], [3, 4]]),
    ],
)
def test_exif_orientation_is_undone(turn, upright):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = turn
    data = pictures.encode(grey([[1, 2], [3, 4]]), "PNG", exif=exif)
    assert decode_image(data, Preprocessing(2))[0][..., 0].tolist() == upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_that_only_xmp_tells_is_none(kind):
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    how = {"xmp": packet}
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", packet.decode())
        how = {"pnginfo": text}
    if kind == "TIFF":
        how = {"tiffinfo": {700: packet}}
    data = pictures.encode(Image.new("RGB", (40, 28)), kind, **how)
    assert Image.open(BytesIO(data)).getexif()[pictures.ORIENTATION] == 6  # as Pillow has it
    assert decode_image(data, Preprocessing(8, formats=EVERYTHING))[1:] == (40, 28)


def test_a_tiff_is_not_lost_for_what_its_xmp_is():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = 3  # SHORT
    tags[700] = (1, 2)
    data = pictures.encode(grey([[7, 7]]), "TIFF", tiffinfo=tags)
    assert decode_image(data, Preprocessing(1, formats=EVERYTHING))[0].tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("rows", [0, 5, 19, 20])
@pytest.mark.parametrize("value", [0, 200])
def test_a_png_whose_pixels_end_early_is_damaged(interlaced, rows, value):
    """Its stream ends well, and so does Pillow, with what is missing black."""
    sides = [(20, 20)]
    if interlaced:  # the seven passes of 20 x 20
        sides = [(3, 3), (2, 3), (5, 2), (5, 5), (10, 5), (10, 10), (20, 10)]
    lines = [b"\0" + bytes([value]) * 3 * columns for columns, count in sides for _ in range(count)]
    held = zlib.compress(b"".join(lines[: len(lines) - 20 + rows]))
    header = struct.pack(">IIBBBBB", 20, 20, 8, 2, 0, 0, interlaced)
    body = [(b"IHDR", header), (b"IDAT", held[:9]), (b"IDAT", held[9:]), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(pictures.png_chunk(*chunk) for chunk in body)
    if rows == 20:
        assert decode_image(data, Preprocessing(1))[0].tolist() == [[[value] * 3]]
    else:
        assert error_of(data).error_class == "CorruptImage"
        assert re.search(
            r"pixels end after \d+ of \d+ bytes|file is truncated", error_of(data).message
        )


def test_an_interlaced_png_may_have_its_last_row_and_end_early_all_the_same():
    """Of an odd height the last pass, every other row, does not hold the last one."""
    sides = [(3, 3), (2, 3), (5, 2), (5, 5), (10, 5), (10, 10), (20, 9)]  # of 20 x 19
    lines = [b"\0" + b"\xc8" * 3 * columns for columns, count in sides for _ in range(count)]
    header = struct.pack(">IIBBBBB", 20, 19, 8, 2, 0, 0, 1)

    def png(held):
        body = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(held))), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(pictures.png_chunk(*chunk) for chunk in body)

    assert decode_image(png(lines), Preprocessing(1))[0].tolist() == [[[200, 200, 200]]]
    assert Image.open(BytesIO(png(lines[:-1]))).getpixel((0, 18)) == (200, 200, 200)
    assert error_of(png(lines[:-1])).error_class == "CorruptImage"


@pytest.mark.parametrize("side", [256, 512])
def test_a_tile_is_held_to_the_limit_too(side):
    """It is decoded whole, here for 16 x 16 pixels."""
    tile = zlib.compress(bytes([7]) * side * side)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8}
    tags[325] = len(tile)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(tile)) + tile + directory
    how = Preprocessing(1, formats=EVERYTHING, max_pixels=1 << 16)
    if side == 256:
        assert decode_image(data, how)[0].tolist() == [[[7, 7, 7]]]
    else:
        assert error_of(data, how).error_class == "TooManyPixels"


def test_an_avif_is_decoded_by_one_thread():
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(10))
def test_size_is_told_after_orientation(kind, turn):
    data = pictures.oriented(turn, kind)
    pixels, width, height = decode_image(data, exact(16, fit="cover", formats=EVERYTHING))
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert (width, height) == upright.size == ((28, 40) if 5 <= turn <= 8 else (40, 28))
    np.testing.assert_array_equal(pixels, fit_image(upright, Preprocessing(16, fit="cover")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_picture(kind):
    assert decode_image(pictures.broken_exif(kind), Preprocessing(8))[1:] == (40, 28)


def test_exif_that_raises_does_not_cost_the_picture():
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n       4\nno hex")
    data = pictures.encode(pictures.photo(), "PNG", pnginfo=text)
    with pytest.raises(ValueError, match="hex"):
        Image.open(BytesIO(data)).getexif()
    assert decode_image(data, Preprocessing(8))[1:] == (40, 28)


MIB = 1 << 20


@pytest.mark.parametrize("chunk", ["icc", "compressed text", "text"])
def test_a_png_may_hold_megabytes_beside_its_pixels(chunk):
    def png(size, count=1):
        text = PngImagePlugin.PngInfo()
        for _ in range(count if chunk != "icc" else 0):
            text.add_text("Comment", "x" * size, zip=chunk == "compressed text")
        icc = bytes(size) if chunk == "icc" else None
        return pictures.encode(pictures.photo(), "PNG", pnginfo=text, icc_profile=icc)

    assert decode_image(png(3 * MIB), Preprocessing(8))[1:] == (40, 28)
    # What unpacks to more than a bound is not unpacked further.
    too_many = {"icc": (9 * MIB, 1), "compressed text": (9 * MIB, 1), "text": (13 * MIB, 5)}
    with pytest.raises(ImageError) as caught:
        decode_image(png(*too_many[chunk]), Preprocessing(8))
    assert caught.value.error_class == "CorruptImage"
    assert "too large" in caught.value.message.lower() or "too much" in caught.value.message.lower()


def test_a_damaged_byte_of_exif_does_not_cost_the_jpeg():
    data = pictures.oriented(6, "JPEG")
    start = data.index(b"Exif")
    length = struct.unpack_from(">H", data, start - 2)[0]
    for at in range(start, start + length - 2):
        for value in (0, 255, data[at] ^ 1, data[at] ^ 128):
            decode_image(data[:at] + bytes([value]) + data[at + 1 :], Preprocessing(4))


def test_a_damaged_index_of_an_mpo_does_not_cost_its_first_picture():
    data = pictures.mpo()
    start = data.index(b"MPF\0")
    for at in range(start, start + 80):
        decode_image(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], Preprocessing(4))


# ---------------------------------------------------------------- JPEG's scaled decoding


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("fit", FITS)
def test_scaled_decoding_is_close_and_tells_the_true_size(fit, turn):
    data = pictures.oriented(turn, "JPEG", 1001, 703)  # neither side divides by 2
    how = Preprocessing(64, fit)
    pixels, width, height = decode_image(data, how)
    plain = decode_image(data, replace(how, jpeg_scaling="off"))
    assert (width, height) == plain[1:] == ((703, 1001) if turn >= 5 else (1001, 703))
    image, view = open_rgb(data, how)
    assert view.scale > 1
    assert image.width < width
    difference = np.abs(pixels.astype(int) - plain[0])
    assert 0 < difference.mean() < 0.5


@pytest.mark.parametrize(
    ("width", "height", "options", "scale"),
    [
        (400, 400, {}, 2),
        (399, 400, {}, 1),  # less than twice the target one way
        (800, 800, {}, 4),
        (3000, 2000, {}, 8),
        (400, 400, {"fit": "slim"}, 1),  # its middle would be resized from 350
        (460, 460, {"fit": "slim"}, 2),
        (400, 200, {"fit": "pad"}, 2),
        (400, 800, {"fit": "cover"}, 2),
        (800, 800, {"filter": "bilinear"}, 1),
        (800, 800, {"jpeg_scaling": "off"}, 1),
    ],
)
def test_scaled_decoding_keeps_twice_the_target(width, height, options, scale):
    data = pictures.encode(Image.new("RGB", (width, height)), "JPEG")
    assert open_rgb(data, Preprocessing(100, **options))[1].scale == scale


def test_a_jpeg_that_cannot_be_scaled_is_decoded_in_full(monkeypatch):
    load = JpegImagePlugin.JpegImageFile.load

    def only_whole(image):
        if image.decoderconfig and image.decoderconfig[0] > 1:
            raise OSError("broken data stream when reading image file")
        return load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", only_whole)
    data = pictures.jpeg(200, 160)
    pixels, *size = decode_image(data, Preprocessing(16))
    np.testing.assert_array_equal(pixels, decode_image(data, exact(16))[0])
    assert size == [200, 160]


# ---------------------------------------------------------------- failures


def test_failures_have_the_class_that_fits():
    jpeg = pictures.jpeg()
    assert error_of(b"").error_class == "EmptyImage"
    assert error_of(b"hello").error_class == "UnsupportedFormat"
    assert error_of(jpeg[:2]).error_class == "CorruptImage"
    assert error_of(jpeg[:-20]).error_class == "CorruptImage"
    assert error_of(b"\x89PNG").error_class == "CorruptImage"
    assert error_of(pictures.declaring("png", 0, 5)).error_class == "CorruptImage"
    assert error_of(jpeg, Preprocessing(8, formats=("png",))).error_class == "UnsupportedFormat"


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"II*\0" + bytes(8), "tiff"),
        (b"\0\0\0\x1cftypavif", "avif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0avifmiaf", "avif"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "heif"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "mp4"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
        (b"P6 1 1 255 ", "pnm"),
        (b"%PDF-1.7", "pdf"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"<html>", "html"),
    ],
)
def test_another_format_is_named(start, name):
    error = error_of(start)
    assert error.error_class == "UnsupportedFormat"
    assert f"looks like {name}" in error.message
    assert "jpeg, png" in error.message


def test_no_other_decoder_of_pillow_is_reached(monkeypatch):
    """Neither by Pillow's search among its plugins, nor for a file that one of them would take."""

    def search(*args, **kwargs):
        raise AssertionError("Pillow looks for a plugin")

    kinds = ("PPM", "TGA", "PCX", "SGI", "EPS", "IM", "DDS", "ICO", "JPEG2000", "PDF", "MSP")
    others = [pictures.encode(pictures.photo().copy(), kind) for kind in kinds[:-1]]
    others.append(pictures.encode(Image.fromarray(pictures.photo()).convert("1"), "MSP"))
    others.append(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("open", "preinit", "init"):
        monkeypatch.setattr(Image, name, search)
    for name, data in GOOD.items():
        assert decode_image(data, Preprocessing(8))[0].shape == (8, 8, 3), name
    everything = Preprocessing(8, formats=FORMATS + MORE_FORMATS)
    for data in others:
        assert error_of(data, everything).error_class == "UnsupportedFormat"


@pytest.mark.parametrize("name", [name for name in GOOD if "animated" not in name])
def test_a_cut_file_never_passes(name):
    for keep in (0.1, 0.3, 0.45):  # the first of an MPO's pictures ends after half of it
        data = pictures.truncated(GOOD[name], keep)
        error = error_of(data)
        assert error.error_class in ("CorruptImage", "UnsupportedFormat")


PILLOWS_ERRORS = [
    OSError("image file is truncated"),
    UnidentifiedImageError("cannot identify"),
    Image.DecompressionBombError("bomb"),
    ValueError("not enough image data"),
    SyntaxError("broken PNG file"),
    RuntimeError("Failed to decode image"),
    NotImplementedError("mode"),
    MemoryError(),
    EOFError("no more images"),
    struct.error("unpack requires"),
    IndexError("index out of range"),
    KeyError("MPO"),
    TypeError("ord"),
    AssertionError(),
    OverflowError("too large"),
    OSError("line one\nline two " + "x" * 2000),
]


@pytest.mark.parametrize("error", PILLOWS_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["open_rgb", "fit_image"])
def test_whatever_is_raised_becomes_one_line(monkeypatch, error, step):
    def fail(*_):
        raise error

    monkeypatch.setattr(module, step, fail)
    seen = error_of(GOOD["png"])
    assert seen.error_class == "CorruptImage"
    assert seen.message.startswith(f"png: {type(error).__name__}")
    assert len(seen.message) < MESSAGE_LIMIT
    assert "\n" not in seen.message


def test_an_interrupt_is_not_a_bad_picture(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "open_rgb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_image(GOOD["png"], Preprocessing(8))


@pytest.mark.parametrize("name", GOOD)
def test_the_pixel_cap_is_exact(name):
    data = GOOD[name]
    _, width, height = decode_image(data, Preprocessing(8))
    decode_image(data, Preprocessing(8, max_pixels=width * height))
    if width * height > 1:
        tight = Preprocessing(8, max_pixels=width * height - 1)
        assert error_of(data, tight).error_class == "TooManyPixels"


def test_huge_declared_sizes_take_no_memory():
    bombs = {
        "png": (pictures.declaring("png", 9460, 9460), "TooManyPixels"),
        "webp": (pictures.declaring("webp", 16383, 16383), "TooManyPixels"),
        "gif": (pictures.declaring("gif", 65535, 65535), "TooManyPixels"),
        "bmp": (pictures.declaring("bmp", 30000, 30000), "TooManyPixels"),
        "jpeg": (pictures.declaring("jpeg", 65500, 65500), "TooManyPixels"),
        "strip": (pictures.declaring("png", 1, 80_000_000), "TooManyPixels"),
        "png text": (pictures.png_text_bomb(), "CorruptImage"),
    }
    for name, (data, expected) in bombs.items():
        peak, seen = peak_memory([data])
        assert seen == [expected], name
        assert peak < 20 << 20, f"{name}: {peak >> 20} MB"


def test_a_webp_is_refused_before_its_decoder_is_made(monkeypatch):
    def decoder(_):
        raise AssertionError("the canvas is allocated here")

    monkeypatch.setattr(module, "OPENERS", {"webp": decoder})
    for data in (
        pictures.declaring("webp", 5000, 4000),  # extended, lossless, lossy
        pictures.encode(Image.new("RGB", (5000, 4000)), "WEBP", lossless=True, method=0),
        pictures.encode(Image.new("RGB", (5000, 4000)), "WEBP", method=0),
    ):
        error = error_of(data, Preprocessing(8, max_pixels=19_999_999))
        assert error.message.startswith("5000 x 4000")
        assert error.error_class == "TooManyPixels"


def peak_memory(files: list[bytes]) -> tuple[int, list[str | None]]:
    """Bytes by which decoding `files` in a process of its own raises its peak; their failures."""
    script = """
import json, re, sys
from pathlib import Path
from formats.image import FORMATS, MORE_FORMATS, Preprocessing, decode_image
from formats.records import ImageError
files = [bytes.fromhex(line) for line in sys.stdin.read().split()]
how, seen = Preprocessing(32, formats=FORMATS + MORE_FORMATS), []
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
for data in files:
    try:
        seen.append(decode_image(data, how) and None)
    except ImageError as error:
        seen.append(error.error_class)
print(json.dumps([(peak() - before) * 1024, seen]))
"""  # not ru_maxrss: that of the process which forked stays the least a child can show
    text = "\n".join(data.hex() for data in files)
    ran = subprocess.run(
        [sys.executable, "-c", script], input=text, capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    return tuple(json.loads(ran.stdout))


def test_the_memory_test_can_fail():
    data = pictures.encode(Image.new("RGB", (4000, 4000)), "PNG")
    peak, seen = peak_memory([data])
    assert seen == [None]
    assert peak > 40 << 20


def test_nothing_reaches_stderr():
    script = """
import struct
import pictures
from formats.image import FORMATS, MORE_FORMATS, Preprocessing, decode_image
from formats.records import ImageError
exif = b"Exif\\0\\0II*\\0\\x08\\0\\0\\0\\2\\0\\x1a\\1\\5\\0\\1\\0\\0\\0\\xff\\xff\\xff\\0"
tiff = pictures.encode(pictures.photo(), "TIFF")
samples = struct.pack("<HHI", 277, 3, 1)
more = [
    pictures.encode(pictures.photo(), "PNG", exif=exif),
    pictures.palette(bytes(range(99))),
    tiff.replace(samples + b"\\x03", samples + b"\\x63"),
]
assert more[-1] != tiff
for data in [*pictures.good().values(), *more]:
    for piece in (data, data[: len(data) * 2 // 3]):
        try:
            decode_image(piece, Preprocessing(8, formats=FORMATS + MORE_FORMATS))
        except ImageError:
            pass
"""
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_transparent_pictures_do_not_even_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, data in GOOD.items():
            if "alpha" in name or "palette" in name or "gif" in name:
                decode_image(data, Preprocessing(8))


# ---------------------------------------------------------------- laws


FLIPS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6
)
HOWS = st.builds(
    Preprocessing,
    size=st.integers(1, 40),
    fit=st.sampled_from(FITS),
    filter=st.sampled_from(FILTERS),
    jpeg_scaling=st.sampled_from(("auto", "off")),
    max_pixels=st.just(1_000_000),
)


def decodes_or_says_why(data: bytes, how: Preprocessing) -> None:
    try:
        pixels, width, height = decode_image(data, how)
    except ImageError as error:
        message = error.message
    else:
        assert (pixels.shape, pixels.dtype) == ((how.size, how.size, 3), np.uint8)
        assert 0 < width * height <= how.max_pixels
        return
    assert 0 < len(message) < MESSAGE_LIMIT


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(GOOD)), flips=FLIPS, how=HOWS)
def test_damage_gives_pixels_or_an_image_error(name, flips, how):
    data = bytearray(GOOD[name])
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    decodes_or_says_why(bytes(data), how)


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from(sorted(GOOD)), keep=st.integers(0, 40), rest=st.binary(max_size=200))
def test_noise_gives_pixels_or_an_image_error(start, keep, rest):
    decodes_or_says_why(GOOD[start][:keep] + rest, Preprocessing(8, max_pixels=1_000_000))


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), how=HOWS)
def test_any_size_fits(width, height, how):
    image = Image.new("RGB", (width, height), (200, 100, 50))
    pixels = fit_image(image, how)
    assert pixels.shape == (how.size, how.size, 3)
    shown = pixels.reshape(-1, 3).max(axis=0)
    assert shown.tolist() == [200, 100, 50]  # a plain picture stays plain, whatever the filter


def test_a_long_strip_is_covered_without_filling_memory():
    for name in FILTERS:
        image = Image.new("RGB", (1, 200_000), (9, 8, 7))
        started = time.monotonic()
        pixels = fit_image(image, Preprocessing(64, "cover", name))
        assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[9, 8, 7]]
        assert time.monotonic() - started < 5


def test_threads_get_what_one_gets():
    work = [(data, Preprocessing(24, fit)) for data in GOOD.values() for fit in FITS] * 3
    alone = [decode_image(*job) for job in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: decode_image(*job), work))
    for (pixels, *size), (others, *other_size) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(pixels, others)
        assert size == other_size


# ---------------------------------------------------------------- the options


def test_unknown_values_are_refused():
    for options in (
        {"fit": "strech"},
        {"filter": "nearest"},
        {"jpeg_scaling": "on"},
        {"formats": ("jpg",)},
        {"size": 0},
        {"max_pixels": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Preprocessing(**{"size": 8, **options})


def test_the_description_is_json_and_follows_the_options():
    how = Preprocessing(224)
    told = how.describe()
    assert json.loads(json.dumps(told)) == told
    for change in ({"size": 9}, {"fit": "pad"}, {"filter": "bilinear"}, {"formats": ("png",)}):
        assert replace(how, **change).describe() != told
    assert replace(how, filter="bilinear").describe()["jpeg_scaling"] == "off"


# ---------------------------------------------------------------- real damage

NAMED = {"jpeg?": "CorruptImage", "png?": "CorruptImage", "empty": "EmptyImage"}


@pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no {CORPUS}: real pictures and real damage")
class TestCorpus:
    @pytest.fixture(scope="class")
    def rows(self) -> list[dict[str, str]]:
        with open(CORPUS / "manifest.csv", newline="") as file:
            return list(csv.DictReader(file))

    @pytest.mark.parametrize("formats", [FORMATS, EVERYTHING], ids=["default", "everything"])
    def test_verdicts_and_sizes(self, rows, formats):
        how, wrong = Preprocessing(32, formats=formats), []
        for row in rows:
            seen = self.outcome((CORPUS / row["path"]).read_bytes(), how)
            if seen not in self.allowed(row, formats):
                wrong.append((row["path"], row["expected"], seen))
        assert len(rows) == 366
        assert not wrong

    @staticmethod
    def outcome(data: bytes, how: Preprocessing) -> str:
        try:
            return "{1} x {2}".format(*decode_image(data, how))
        except ImageError as error:
            return error.error_class

    @staticmethod
    def allowed(row: dict[str, str], formats: tuple[str, ...]) -> set[str]:
        if row["container"] not in formats:
            return {NAMED.get(row["container"], "UnsupportedFormat")}
        if row["expected"] in ("reject", "limit"):
            return {"CorruptImage", "TooManyPixels"}
        size = [row["width"], row["height"]]
        # The manifest has sizes as stored, but for TIFF as Pillow tells them: turned already.
        if row["orientation"] in ("5", "6", "7", "8") and row["container"] != "tiff":
            size.reverse()
        whole = {" x ".join(size)}
        return whole | {"CorruptImage"} if row["expected"] == "either" else whole

    def test_fit_filter_and_scaling_do_not_change_a_verdict(self, rows):
        for row in rows:
            data = (CORPUS / row["path"]).read_bytes()
            seen = {
                self.outcome(data, Preprocessing(4, fit, name)) for fit in FITS for name in FILTERS
            }
            assert len(seen) == 1, (row["path"], seen)

    def test_limits_hold_before_memory_is_taken(self, rows):
        files = [(CORPUS / row["path"]).read_bytes() for row in rows if row["expected"] == "limit"]
        peak, seen = peak_memory(files)
        assert None not in seen
        assert len(seen) == 16
        assert peak < 50 << 20

    def test_formats_are_told_by_their_first_bytes(self, rows):
        for row in rows:
            if row["container"] in EVERYTHING:
                assert looks_like((CORPUS / row["path"]).read_bytes()) == row["container"], row
