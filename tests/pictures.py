"""Pictures for the tests: every format, mode and defect, made on the spot and always the same."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def photo(width: int = 40, height: int = 28, seed: int = 0) -> np.ndarray:
    """Something like a photograph: uint8 [height, width, 3], smooth with grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 6, (height, width, 3))
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def encode(picture: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """`picture` as a file in Pillow's format `kind` ("JPEG", "PNG", ...)."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int = 40, height: int = 28, mode: str = "RGB", **options) -> bytes:
    """A JPEG in mode RGB (stored as YCbCr), L or CMYK."""
    image = Image.fromarray(photo(width, height)).convert(mode)
    return encode(image, "JPEG", **{"quality": 90, **options})


def mpo(width: int = 40, height: int = 28) -> bytes:
    """Two JPEGs in one file, as stereo cameras write."""
    second = Image.fromarray(photo(width, height, seed=1))
    return encode(photo(width, height), "MPO", save_all=True, append_images=[second])


def animation(kind: str, width: int = 40, height: int = 28, **options) -> bytes:
    """Three different frames as GIF, WEBP or PNG."""
    frames = [Image.fromarray(photo(width, height, seed)) for seed in range(3)]
    if kind == "GIF":
        frames = [frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
        options = {"disposal": 2, **options}
    if kind == "WEBP":
        options = {"lossless": True, **options}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def oriented(turn: int, kind: str = "PNG", width: int = 40, height: int = 28) -> bytes:
    """`photo` with EXIF orientation `turn`, any number; the pixels are stored as they are."""
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encode(photo(width, height), kind, exif=exif, **lossless)


def broken_exif(kind: str = "JPEG") -> bytes:
    """`photo` with an EXIF block that is noise after its first bytes."""
    noise = np.random.default_rng(0).bytes(60)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encode(photo(), kind, exif=b"Exif\0\0MM\0*\0\0\0\x08" + noise, **lossless)


def deep_grey(width: int = 40, height: int = 28, kind: str = "PNG") -> tuple[bytes, np.ndarray]:
    """16-bit grey and its values, uint16 [height, width], over the whole range."""
    values = np.linspace(0, 65535, width * height).round().astype(np.uint16)
    return encode(values.reshape(height, width), kind), values.reshape(height, width)


def one_bit() -> bytes:
    """A 1-bit PNG."""
    return encode(Image.fromarray(photo()).convert("1"), "PNG")


def palette(transparency: int | bytes | None = None) -> bytes:
    """A PNG with a palette, and transparent entries where given."""
    image = Image.fromarray(photo()).convert("P", palette=Image.Palette.ADAPTIVE)
    options = {} if transparency is None else {"transparency": transparency}
    return encode(image, "PNG", **options)


def with_alpha(mode: str = "RGBA", kind: str = "PNG", **options) -> bytes:
    """A picture whose alpha runs from clear to opaque; `mode` RGBA or LA."""
    image = Image.fromarray(photo())
    alpha = np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1))
    image = image.convert(mode[:-1])
    image.putalpha(Image.fromarray(alpha))
    return encode(image, kind, **options)


def truncated(data: bytes, keep: float = 0.6) -> bytes:
    """The first part of a file."""
    return data[: int(len(data) * keep)]


def png_chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def declaring(kind: str, width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of `width` x `height`: png, webp, gif, bmp or jpeg."""
    if kind == "png":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    if kind == "webp":  # extended, its canvas larger than the animation's only frame
        frame = encode(photo(8, 8), "WEBP", lossless=True)[12:]
        sides = [struct.pack("<I", side - 1)[:3] for side in (width, height)]
        box = bytes(6) + struct.pack("<I", 7)[:3] * 2 + bytes(4) + frame
        body = b"VP8X" + struct.pack("<II", 10, 0x02) + b"".join(sides)
        body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
        body += b"ANMF" + struct.pack("<I", len(box)) + box
        return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    if kind == "gif":  # a small screen, a huge frame that is to be disposed of
        control = b"!\xf9\x04" + bytes([2 << 2, 0, 0, 0]) + b"\0"
        frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"
        return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + control + frame
    if kind == "bmp":
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(100)
    if kind == "jpeg":
        data = bytearray(jpeg(8, 8))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
        return bytes(data)
    raise ValueError(kind)


def png_text_bomb() -> bytes:
    """A small PNG whose colour profile and text inflate to 64 MB each."""
    packed = zlib.compress(bytes(64 << 20), 9)
    data = encode(photo(8, 8), "PNG")
    chunks = png_chunk(b"iCCP", b"p\0\0" + packed) + png_chunk(b"zTXt", b"t\0\0" + packed)
    return data[:33] + chunks + data[33:]


def good() -> dict[str, bytes]:
    """Pictures that decode with the default formats, by a name that tells what they are."""
    return {
        "jpeg": jpeg(),
        "jpeg_grey": jpeg(mode="L"),
        "jpeg_cmyk": jpeg(mode="CMYK"),
        "jpeg_progressive": jpeg(progressive=True),
        "jpeg_mpo": mpo(),
        "jpeg_turned": oriented(6, "JPEG"),
        "jpeg_broken_exif": broken_exif(),
        "png": encode(photo(), "PNG"),
        "png_one_bit": one_bit(),
        "png_palette": palette(),
        "png_palette_clear": palette(transparency=bytes(range(200))),
        "png_grey_16": deep_grey()[0],
        "png_alpha": with_alpha(),
        "png_grey_alpha": with_alpha("LA"),
        "png_animated": animation("PNG"),
        "webp": encode(photo(), "WEBP"),
        "webp_alpha": with_alpha(kind="WEBP", lossless=True),
        "webp_animated": animation("WEBP"),
        "webp_turned": oriented(8, "WEBP"),
        "gif": encode(Image.fromarray(photo()).convert("P"), "GIF"),
        "gif_animated": animation("GIF"),
        "bmp": encode(photo(), "BMP"),
        "bmp_palette": encode(Image.fromarray(photo()).convert("P"), "BMP"),
        "one_by_one": encode(photo(1, 1), "PNG"),
        "strip": encode(photo(1, 300), "PNG"),
    }
