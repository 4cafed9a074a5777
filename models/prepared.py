"""The files of a prepared model, written and read; without TensorFlow, and so while it is imported.

A folder with `graph.pb`, the frozen and folded graph that takes uint8 pixels, `weights.npz`, what
its placeholders stand for, and `prepared.json`, what is known of it. Weights have the model's own
type, for every precision.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from models.handles import PREPARED_FILE
from storage import files

VERSION = 2
_GRAPH_FILE, _WEIGHTS_FILE = "graph.pb", "weights.npz"


@dataclass(frozen=True)
class Prepared:
    """`info`: what is known of the model; `graph`: a GraphDef's bytes; `weights` by name."""

    info: Mapping[str, Any]
    graph: bytes
    weights: Mapping[str, np.ndarray]


def write(folder: str, model: Prepared) -> None:
    """Write `model` to `folder`, also of gs:// or s3://; its description last, which marks it."""
    weights = io.BytesIO()
    np.savez(weights, allow_pickle=False, **cast(Any, model.weights))
    parts: dict[str, Any] = {_GRAPH_FILE: model.graph, _WEIGHTS_FILE: weights.getbuffer()}
    for name, data in parts.items():
        files.write_bytes(files.join(folder, name), data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    described = {"prepared_version": VERSION, **model.info, "sha256": digests}
    files.write_bytes(files.join(folder, PREPARED_FILE), json.dumps(described, indent=1).encode())


def read(folder: str) -> Prepared:
    """The model in `folder`; OSError, ValueError, KeyError or TypeError where it is not whole."""
    ahead = _ahead.pop(folder, None)
    return ahead.result() if ahead else _read(folder)


def _read(folder: str) -> Prepared:
    described = json.loads(files.read_bytes(files.join(folder, PREPARED_FILE)))
    if described.pop("prepared_version") != VERSION:
        raise ValueError("made by another version of this program")
    parts = {}
    for name, digest in described.pop("sha256").items():
        parts[name] = files.read_bytes(files.join(folder, name))
        if hashlib.sha256(parts[name]).hexdigest() != digest:
            raise ValueError(f"{name} was cut or altered")
    with np.load(io.BytesIO(parts[_WEIGHTS_FILE])) as weights:
        arrays = {name: weights[name] for name in weights.files}
    return Prepared(described, parts[_GRAPH_FILE], arrays)


_ahead: dict[str, Future[Prepared]] = {}


def read_ahead(folder: str) -> None:
    """Start to read `folder` on a thread, where TensorFlow is yet to be imported: seconds of both.

    `drop_ahead` forgets what nobody has asked for.
    """
    if "tensorflow" in sys.modules:
        return
    coming: Future[Prepared] = Future()

    def fulfil() -> None:
        try:
            coming.set_result(_read(folder))
        except BaseException as error:
            coming.set_exception(error)

    _ahead[folder] = coming
    threading.Thread(target=fulfil, name="prepared", daemon=True).start()


def drop_ahead() -> None:
    """Forget what `read_ahead` has read and nobody uses."""
    _ahead.clear()
