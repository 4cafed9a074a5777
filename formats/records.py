"""What flows through the pipeline: one record a stage, and the failure that can end each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.secrets import hide

MESSAGE_LIMIT = 500  # characters; the contract's bound on a failure's message
DUPLICATE = "DuplicateKey"  # class of an image whose id is another's


class ImageError(Exception):
    """One image cannot be used: a class to count by and one line that says why."""

    def __init__(self, error_class: str, message: str):
        super().__init__(error_class, message)
        self.error_class = error_class
        self.message = message


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Which image: what names it and what travels beside its pixels.

    `source` is the path or URI it was read from, `record_index` its position there (None for a
    file that is one image), `columns` the carried features by name.
    """

    key: str
    source: str
    record_index: int | None = None
    label: int | str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An encoded image as read: `data` holds the file's bytes."""

    ref: ImageRef
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """A picture ready for the model.

    `pixels` is uint8 [S, S, 3], RGB. `width` and `height` are the picture's own, in pixels, after
    orientation; `sha256` and `bytes` are the digest (lower-case hex) and size of the encoded file.
    """

    ref: ImageRef
    sha256: str
    bytes: int
    width: int
    height: int
    pixels: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the model says of one image: float32 vectors by output name ("embedding", "logits")."""

    ref: ImageRef
    sha256: str
    width: int
    height: int
    vectors: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image (or a damaged place in a container) has no features.

    `stage` is "read", "decode" or "infer"; `bytes` the encoded size where known; `sha256` the
    digest of the encoded bytes, None where they were not read.
    """

    key: str
    source: str
    record_index: int | None
    stage: str
    error_class: str
    message: str
    sha256: str | None = None
    bytes: int | None = None

    @classmethod
    def of(
        cls,
        ref: ImageRef,
        stage: str,
        error: ImageError,
        sha256: str | None = None,
        size: int | None = None,
    ) -> Failure:
        """The failure of `ref` at `stage`, with the message on one line and within its bound."""
        return cls(
            ref.key,
            ref.source,
            ref.record_index,
            stage,
            error.error_class,
            one_line(error.message),
            sha256,
            size,
        )


def place_key(source: str, index: int | None) -> str:
    """The key of the image at a place that has no id: `source#index`, `source` for a file."""
    return source if index is None else f"{source}#{index}"


def utf8(text: str | None) -> str | None:
    """`text` as Arrow can hold it: bytes of a file name that are no UTF-8 as `\\xNN`."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    """`text` without line breaks and credentials, under `MESSAGE_LIMIT` characters.

    As it will be written: what is no UTF-8 in it is escaped first, which makes it longer.
    """
    flat = " ".join(hide(text).split())
    try:
        flat = utf8(flat) or ""
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        flat = flat.encode("utf-8", "backslashreplace").decode()
    return flat if len(flat) < MESSAGE_LIMIT else flat[: MESSAGE_LIMIT - 4] + "..."


def digest(data: bytes) -> str:
    """SHA-256 of `data` in lower-case hex."""
    return hashlib.sha256(data).hexdigest()
