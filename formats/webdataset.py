"""WebDataset tars, plain or gzip: members grouped into samples, and every damage as a value.

A sample is a run of members whose names agree up to the first dot of the file name; what follows
that dot is the member's extension (https://github.com/webdataset/webdataset). A tar holds no
checksum of its payloads and nothing to find a place again by: behind a wrong header nothing can be
reached.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from formats import fields
from formats.example import ExampleKeys
from formats.fields import Found
from formats.records import ImageError
from formats.streams import GZIP, ExactStream, InflatedStream, skip
from formats.tfrecord import Damage

ENDINGS = (".tar", ".tar.gz", ".tgz")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
KEY = "__key__"  # what --id_key, --label_key and --columns call the sample's own name
DEFAULT_IMAGE, DEFAULT_LABEL = ExampleKeys().image, ExampleKeys().label

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_TEXT_BYTES = 16 << 20  # largest member that is read as text or JSON
_NAME_FIELD = 100  # bytes of a name in a header itself
_GNU = b"ustar  \0"
# Of records in extended headers, besides a vendor's with a dot. A flipped bit makes another.
_PAX_NAMES = {
    *("path", "linkpath", "size", "uid", "gid", "uname", "gname", "mtime", "atime", "ctime"),
    *("comment", "charset", "hdrcharset"),
}
NAMELESS = "DamagedName"  # the class of what costs one member, behind which the tar goes on
_UNNAMED = "an extended header is damaged, which may name the next member"
_NAME_BYTES = 1 << 20  # largest header of a long name
_SAMPLE_BYTES = 512 << 20  # a sample is cut in two rather than hold more than this
_NUMBERS = ("cls", "cls2", "class", "count", "index", "inx", "id")  # integers in WebDataset too
_META = re.compile(r"__[^/]*__($|/)")  # members about the tar itself
_MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]*)", re.DOTALL)
_SIZE = re.compile(r"[0-9]{1,20}")
_PAX = re.compile(rb"(\d{1,20}) ([^=]+)=")


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with `head` is a tar, plain or gzip, by its first header.

    `head` needs 512 bytes of a plain file; 4096 are enough of a gzip file.
    """
    if head.startswith(GZIP):
        head = InflatedStream(ExactStream(io.BytesIO(head), None), b"").read(_BLOCK)
    return _header(head[:_BLOCK]) is not None or head[:_BLOCK] == _ZEROS  # one without members


def read_images(
    stream: BinaryIO, size: int | None, keys: ExampleKeys, max_image_bytes: int
) -> Iterator[Found | Damage]:
    """The images of a tar in order, a Damage for what ends it before its time, or costs a name.

    `index` counts images; a sample without one counts too, and tells so, as does a tar that has
    members and no sample. The default image key
    means any member with an image's extension, another one the member of that extension. A value
    is the sample's name for `__key__`, else the text of the member with that extension, else a
    field of the member `json`; the default label key means `cls`. Members over `max_image_bytes`
    are not read. Only errors of `stream` are raised.
    """
    raw = ExactStream(stream, size)
    source: ExactStream | InflatedStream = raw
    head = raw.read(_BLOCK)
    note = ""
    if head.startswith(GZIP) and _header(head) is None:
        source, size = InflatedStream(raw, head), None
        note = " (offset in the decompressed gzip stream)"
        head = source.read(_BLOCK)
    layout = _Layout(keys, max_image_bytes)
    sample: _Sample | None = None
    index = 0
    outside, first = 0, ""  # members that belong to no sample
    items = _walk(source, head, layout.wants)
    while True:
        dead = None
        try:
            item = next(items, None)
        except OSError as error:
            item, dead = None, error
        named = _split(item.name) if isinstance(item, _Member) else None
        if isinstance(item, _Member) and named is None:
            if not _META.match(item.name.removeprefix("./")):
                outside, first = outside + 1, first or item.name[-100:]
            continue
        if sample is not None and (named is None or not sample.takes(*named)):
            # Where the tar is damaged inside a sample, that one place is told of once.
            broken = isinstance(item, tuple) or dead is not None
            for found in layout.images(sample, index, broken):
                yield found
                index += 1
            sample = None
        if isinstance(item, _End):
            continue
        if isinstance(item, _Member) and named is not None:
            sample = sample or _Sample(named[0])
            sample.add(named[1], item)
        elif isinstance(item, tuple):
            offset, error_class, message = item
            lost = None if size is None else max(size - offset, 0)
            yield Damage(offset, index, error_class, message + note, lost)
            index += 1  # it goes on behind a name, and no image has the place of the damage
        elif dead:
            raise dead
        else:
            if outside and not index:
                message = (
                    f"none of {outside} members belongs to a sample, which takes a name with an "
                    f"extension; the first is {first!r}"
                )
                yield Found(0, None, {}, ImageError("MissingFeature", message))
            return


# --- samples -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Member:
    """A file in the tar; `data` is None where it was not wanted, too large, or not stored here."""

    name: str
    size: int
    data: bytes | None
    stored: bool


class _End:
    """The end mark of a tar; what comes before it is whole."""


@dataclass(slots=True)
class _Sample:
    prefix: str
    members: dict[str, _Member] = field(default_factory=dict)
    held: int = 0

    def takes(self, prefix: str, extension: str) -> bool:
        fresh = extension not in self.members  # twice the same: the next sample, of one name
        return prefix == self.prefix and fresh and self.held < _SAMPLE_BYTES

    def add(self, extension: str, member: _Member) -> None:
        self.members[extension] = member
        self.held += len(member.data or b"")


def _split(name: str) -> tuple[str, str] | None:
    """A member's sample and extension (lower case); None for what belongs to no sample."""
    name = name.removeprefix("./")
    found = _MEMBER.fullmatch(name)
    if found is None or _META.match(name):
        return None
    return found[1], found[2].lower()


class _Layout:
    """What is wanted of a sample, and how its images and values are made of its members."""

    def __init__(self, keys: ExampleKeys, max_image_bytes: int):
        self._keys = keys
        self._names = fields.names_of(keys)
        self._max_image_bytes = max_image_bytes
        self._labelled = False
        default = {DEFAULT_LABEL} if keys.label == DEFAULT_LABEL else set()
        self._texts = {"cls"} if default else set()
        if named := set(self._names) - default:
            self._texts |= {"json", *(name.lower() for name in named)}

    def is_image(self, extension: str) -> bool:
        if self._keys.image != DEFAULT_IMAGE:
            return extension == self._keys.image.lower()
        return extension.rpartition(".")[2] in IMAGE_EXTENSIONS

    def wants(self, name: str, size: int) -> bool:
        named = _split(name)
        if named is None:
            return False
        if self.is_image(named[1]):
            return size <= self._max_image_bytes
        return named[1] in self._texts and size <= _TEXT_BYTES

    def images(self, sample: _Sample, index: int, broken: bool) -> Iterator[Found]:
        values: Mapping[str, Any] = {}
        wrong = None
        try:
            values = self._values(sample)
        except ValueError as error:
            wrong = ImageError("ColumnType", f"sample {sample.prefix[-100:]!r}: {error}")
        if broken and wrong is None:  # what lies behind the cut is not there to be read
            awaited = {*filter(None, (self._keys.id, self._keys.label)), *self._keys.columns}
            if not self._labelled:
                awaited -= {DEFAULT_LABEL}
            if missing := sorted(awaited - values.keys()):
                told = f"the tar is damaged in its sample, before {', '.join(missing)[:200]}"
                wrong = ImageError("MissingFeature", told)
        self._labelled |= DEFAULT_LABEL in values
        images = [m for extension, m in sample.members.items() if self.is_image(extension)]
        for member in images:
            reason = wrong
            if not member.stored:
                reason = ImageError("UnsupportedMember", "a link or a sparse file, not an image")
            elif member.data is None:
                reason = fields.too_many_bytes(member.size, self._max_image_bytes)
            elif not member.data:
                reason = ImageError("MissingFeature", "the member holds zero bytes")
            yield Found(index, member.data or None, values, reason, member.size)
            index += 1
        if not images and not broken:
            there = ", ".join(sorted(sample.members))[:200]
            message = f"sample {sample.prefix[-100:]!r} has no image; it has {there}"
            yield Found(index, None, values, ImageError("MissingFeature", message))

    def _values(self, sample: _Sample) -> dict[str, Any]:
        """ValueError where one that is asked for cannot be read."""
        values: dict[str, Any] = {}
        parsed: dict[str, Any] | None = None
        for name in self._names:
            extension = name.lower()
            if name == KEY:
                values[name] = _text(sample.prefix.encode("utf-8", "surrogateescape"))
            elif extension in sample.members and extension != "json":
                values[name] = self._member(sample, extension, name == self._keys.label)
            elif "json" in sample.members and extension == "json":
                values[name] = _text(_bytes(sample, "json"))
            elif name == self._keys.label == DEFAULT_LABEL:
                if "cls" in sample.members:
                    values[name] = self._member(sample, "cls", True)
            elif "json" in sample.members:
                if parsed is None:
                    parsed = _object(_bytes(sample, "json"))
                if name in parsed:
                    values[name] = parsed[name]
        return values

    def _member(self, sample: _Sample, extension: str, label: bool) -> int | str | bytes:
        text = _text(_bytes(sample, extension))
        if not isinstance(text, str) or not (label or extension in _NUMBERS):
            return text
        return fields.integer(text.strip())


def _bytes(sample: _Sample, extension: str) -> bytes:
    data = sample.members[extension].data
    if data is None:
        raise ValueError(f"its member {extension} is over {_TEXT_BYTES} bytes, or a link")
    return data


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("its json does not parse") from None
    return found if isinstance(found, dict) else {}


# --- the tar itself ----------------------------------------------------------------------------


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header that `block` holds, None where its checksum or a number in it is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # type: ignore[arg-type]
    except (tarfile.HeaderError, ValueError):
        return None
    if block[257:265] == _GNU and info.type not in tarfile.GNU_TYPES:
        # What is a prefix of the name elsewhere are times here, of an incremental archive.
        info.name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return info if info.size >= 0 else None


def _walk(
    source: ExactStream | InflatedStream, block: bytes, wants: Callable[[str, int], bool]
) -> Iterator[_Member | _End | tuple[int, str, str]]:
    """Members in order; a damage, as offset, class and message, is the last item, but of a name.

    Several tars one after the other are read as one. Payloads are read where `wants` the name and
    size. Nothing comes of zero bytes.
    """
    if not block and not source.damage:
        return
    offset = first = 0  # of this header, and of the first one that belongs to its member
    long: dict[str, str] = {}
    ended = damaged = False
    while True:
        if block == _ZEROS:
            if not ended:
                yield _End()
            if damaged:
                yield first, NAMELESS, _UNNAMED
            ended, damaged, long = True, False, {}
            offset += _BLOCK
            first = offset
            block = source.read(_BLOCK)
            continue
        if len(block) < _BLOCK:
            if source.damage:
                yield (first, *source.damage)
            elif long or (block.strip(b"\0") if ended else block):
                yield first, "TruncatedMember", f"the tar ends inside a header, {len(block)} bytes"
            elif not ended:
                yield first, "MissingEnd", "no end mark: the tar may be cut between two members"
            return
        info = _header(block)
        if info is None:
            where = "junk after the end" if ended else "what follows cannot be walked over"
            yield first, "BadHeader", f"a tar header whose checksum is wrong: {where}"
            return
        ended = False
        offset += _BLOCK
        extended = info.type == tarfile.GNUTYPE_SPARSE and block[482] == 1
        while extended:  # the map of a sparse file goes on
            block = source.read(_BLOCK)
            offset += _BLOCK
            extended = len(block) == _BLOCK and block[504] == 1
        size = info.size
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            about = "pax"
        elif info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            about = {tarfile.GNUTYPE_LONGNAME: "path"}.get(info.type, "other")
        else:
            about = ""
            if _SIZE.fullmatch(long.get("size", "")):
                size = int(long["size"])
            if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                size = 0
        if about and size > _NAME_BYTES:
            yield first, "BadHeader", f"a tar header that tells of a name of {size} bytes"
            return
        name = long.get("GNU.sparse.name", long.get("path", info.name))
        data = None
        if about or (info.isreg() and wants(name, size)):
            data = source.read(size)
            whole = len(data) == size
        else:
            whole = skip(source, size)
        padding = -size % _BLOCK
        if whole and padding:
            whole = len(source.read(padding)) == padding
        if not whole:
            reason = f"the tar ends inside a member of {size} bytes"
            yield (first, *(source.damage or ("TruncatedMember", reason)))
            return
        offset += size + padding
        if about == "path":
            long["path"] = (data or b"").rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif about == "pax":
            records = _pax(data or b"")
            damaged = damaged or records is None
            long |= records or {}
        elif not about and (damaged or _is_cut(info, long)):
            yield first, NAMELESS, _UNNAMED
            long, damaged = {}, False
            first = offset
        elif not about:
            stored = info.isreg() and info.type != tarfile.GNUTYPE_SPARSE
            stored = stored and not any(name.startswith("GNU.sparse") for name in long)
            if stored or info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) or info.isreg():
                yield _Member(name, size, data if stored else None, stored)
            long = {}
            first = offset
        block = source.read(_BLOCK)


def _is_cut(info: tarfile.TarInfo, long: Mapping[str, str]) -> bool:
    """Whether this looks like the beginning of a name that the header before it should have."""
    fills = len(info.name.encode("utf-8", "surrogateescape")) == _NAME_FIELD
    odd = any("." not in name and name not in _PAX_NAMES for name in long)
    return fills and odd and _split(info.name) is None and "path" not in long


def _pax(data: bytes) -> dict[str, str] | None:
    """The records of an extended header; None where they do not parse."""
    values = {}
    at = 0
    end = len(data.rstrip(b"\0"))
    while at < end:
        found = _PAX.match(data, at)
        length = int(found[1]) if found else 0
        if (
            found is None
            or length <= found.end() - at
            or data[at + length - 1 : at + length] != b"\n"
        ):
            return None
        text = data[found.end() : at + length - 1].decode("utf-8", "surrogateescape")
        values[found[2].decode("utf-8", "surrogateescape")] = text
        at += length
    return values
