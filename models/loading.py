"""Any handle -> one checked function, pixels -> vectors; and a model prepared for loading so."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models import openvino, prepared
from models.fingerprint import fingerprint
from models.folding import fold
from models.freezing import EMBEDDING, LOGITS, Frozen, Hints, ModelError, freeze, read_proto
from models.fusing import (
    can_fuse,
    fuse_convolutions,
    multiply_by_picture,
    take_larger_by_bits,
    take_odd_pixels,
    to_bfloat16,
)
from models.graphs import PLAIN_KINDS, Graph, kind
from models.handles import PREPARED, model_format, resolve
from models.kernels import chosen_width
from models.prepared import Prepared
from models.runtime import BFLOAT16, CORES, GPU_UNSEEN, GPUS, constant, function_of, tf, twin
from models.safety import check_graph, unsafe_ops, unsafe_types
from models.separable import fuse_separable, has_separable

TENSORFLOW, OPENVINO = "tensorflow", "openvino"
Run = Callable[[np.ndarray], dict[str, np.ndarray]]
_PIXELS = "pixels"


class OutOfMemory(RuntimeError):
    """The device has no memory for a batch of this size."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to load: a model's `handle` (see `handles.resolve`), and which `outputs`, () for all.

    `precision`: "float32" or "bfloat16" (where the device has it: BFLOAT16). `copies`: how many
    calls may run at once. `engine`: what computes, "tensorflow", or "openvino" on CPUs.
    """

    handle: str
    outputs: tuple[str, ...] = ()
    sha256: str | None = None
    hints: Hints = field(default_factory=Hints)
    allow_unsafe_ops: bool = False
    precision: str = "float32"
    copies: int = 1
    engine: str = TENSORFLOW


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a loaded model.

    `format`: "saved_model", "hub_v1" or "prepared". `image_size`: side of the input in pixels.
    `value_range`: of the pixels that the network takes. `outputs`: "embedding" and "logits" to
    width, those that the model has. `fingerprint`: SHA-256 of graph and weights, whatever their
    path or time; that of a prepared model is its origin's.
    """

    format: str
    image_size: int
    value_range: tuple[float, float]
    outputs: Mapping[str, int]
    signatures: tuple[str, ...]
    fingerprint: str


class LoadedModel:
    """A function from pixels to vectors, with what is known of it as `info`.

    May be called from several threads; as many calls run at once as there are `runs`, each of its
    own, since oneDNN's kernels keep state that two calls of one function would share.
    """

    def __init__(self, info: ModelInfo, runs: Sequence[Run]):
        self.info = info
        self._idle: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in runs:
            self._idle.put(run)

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Vectors by output name, float32 [N, width], of `pixels`, uint8 [N, S, S, 3], N >= 1.

        Raises ValueError for other pixels (TensorFlow would abort the process on a wrong rank),
        OutOfMemory, and whatever the graph raises.
        """
        side = self.info.image_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
            raise ValueError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; the model takes uint8 "
                f"[N, {side}, {side}, 3]"
            )
        if not len(pixels):
            raise ValueError("no pixels: the model takes at least one picture")
        run = self._idle.get()
        try:
            return run(pixels)
        finally:
            self._idle.put(run)


_loaded: dict[LoadSpec, LoadedModel] = {}
_loading = threading.Lock()


def load(spec: LoadSpec) -> LoadedModel:
    """The model of `spec`, loaded once a process. Raises RequestError where it cannot be used."""
    with _loading:
        if spec not in _loaded:
            info, graph = _assembled(spec)
            outputs = spec.outputs or tuple(info.outputs)
            bfloat16 = spec.precision == "bfloat16" and BFLOAT16
            graph.prune(outputs)
            if not has_gpu(spec.engine):
                take_odd_pixels(graph)
            if spec.engine == OPENVINO:
                runs = openvino.functions(graph, outputs, bfloat16, spec.copies)
            else:
                _for_device(graph, bfloat16)
                runs = _functions(graph, outputs, spec.copies)
            _loaded[spec] = LoadedModel(info, runs)
        return _loaded[spec]


def prepare(spec: LoadSpec, output: str) -> ModelInfo:
    """Write the model of `spec` to the folder `output`, prepared; returns what is known of it.

    `output` may be gs:// or s3://; the description, by which a folder is known as a model, is
    written last. Raises RequestError where the model cannot be used.
    """
    info, graph = _assembled(spec)
    plain = {n: array for n, array in graph.weights.items() if array.dtype.kind in PLAIN_KINDS}
    whole = graph.to_def(within=graph.weights.keys() - plain)
    data = whole.SerializeToString(deterministic=True)
    prepared.write(output, Prepared(dataclasses.asdict(info), data, plain))
    return info


def look(spec: LoadSpec) -> dict[str, Any]:
    """What is known of the model of `spec`, as JSON holds it. Raises RequestError."""
    return dataclasses.asdict(_assembled(spec)[0])


def unsafe_operations(directory: str) -> list[str]:
    """The operations of the model at `directory` that reach files or the network; runs nothing."""
    if model_format(directory) == PREPARED:
        return unsafe_types(_read_prepared(directory)[1].to_def())
    return unsafe_ops(read_proto(directory))


def has_gpu(engine: str = TENSORFLOW) -> bool:
    """Whether `engine` computes on a GPU on this machine."""
    return bool(GPUS) and engine == TENSORFLOW


def default_batch_size(image_size: int, precision: str, on_gpu: bool) -> int:
    """Images a batch for a machine that computes on a GPU or on none.

    On CPU as many as leave their activations in the cache, and bfloat16's are half as large; a GPU
    wants more, and has no memory to spare for more than it wants.
    """
    if on_gpu:
        return 128 if image_size > 300 else 256
    fitting = 1 if image_size > 300 else 8
    return 2 * fitting if precision == "bfloat16" and BFLOAT16 else fitting


def default_copies(on_gpu: bool) -> int:
    """Batches that run at once here: one for each core, each on one thread; on a GPU two, of which
    one is copied there or back while the other computes.
    """
    return 2 if on_gpu else CORES


def _assembled(spec: LoadSpec) -> tuple[ModelInfo, Graph]:
    """What is known of the model, and its graph from uint8 `pixels` to its outputs by name."""
    directory = resolve(spec.handle, spec.sha256)
    if model_format(directory) == PREPARED:
        info, graph = _read_prepared(directory)
        for flag, asked, has in (
            ("image_size", spec.hints.image_size, info.image_size),
            ("value_range", spec.hints.value_range, info.value_range),
        ):
            if asked not in (None, has):
                raise ModelError(f"--{flag} {asked}: the prepared model was made for {has}")
        check_graph(directory, graph.to_def(), spec.allow_unsafe_ops)
    else:
        frozen = freeze(directory, spec.hints, spec.allow_unsafe_ops)
        check_graph(directory, frozen.graph.to_def(), spec.allow_unsafe_ops)
        info = ModelInfo(
            frozen.format,
            frozen.image_size,
            frozen.value_range,
            dict(frozen.widths),
            frozen.signatures,
            fingerprint(frozen.graph, frozen.outputs),
        )
        graph = _assemble(frozen)
    # Fused layers take the larger of 0 and NaN as 0, so that no vector would tell.
    if wild := sorted(_wild(graph)):
        raise ModelError(
            f"--model {spec.handle}: {len(wild)} of its weights hold NaN or infinity "
            f"({wild[0].removeprefix('model/')}), so its vectors would mean nothing; make it of a "
            "sound checkpoint"
        )
    missing = [name for name in spec.outputs if name not in info.outputs]
    if missing:
        raise ModelError(
            f"--outputs {','.join(missing)}: the model at {spec.handle} has only "
            f"{', '.join(info.outputs)}"
        )
    return info, graph


def _wild(graph: Graph) -> Iterator[str]:
    """Weights that hold NaN or infinity, and small constants that hold NaN: an infinity of theirs
    may be meant.
    """
    for name, array in graph.weights.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all() and not _is_mask(array):
            yield name
    for node in graph.nodes.values():
        floating = node.op == "Const" and tf.as_dtype(kind(node, "dtype")).is_floating
        if floating and np.isnan(tf.make_ndarray(node.attr["value"].tensor)).any():
            yield node.name


def _is_mask(array: np.ndarray) -> bool:
    """Whether it only tells what attention may not look at: zeros and minus infinity."""
    return bool(((array == 0) | np.isneginf(array)).all())


def _read_prepared(directory: str) -> tuple[ModelInfo, Graph]:
    try:
        found = prepared.read(directory)
        known = {**found.info, "format": PREPARED}
        for name in ("value_range", "signatures"):
            known[name] = tuple(known[name])
        info = ModelInfo(**known)
        graph_def = tf.compat.v1.GraphDef.FromString(found.graph)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"--model {directory}: not a whole prepared model ({error}); prepare it again"
        ) from None
    return info, Graph(graph_def, info.outputs, found.weights)


def _assemble(frozen: Frozen) -> Graph:
    """`frozen` with batch norms folded, behind uint8 `pixels` scaled on the device."""
    low, high = frozen.value_range
    side = frozen.image_size
    with tf.Graph().as_default() as assembled:
        pixels = tf.compat.v1.placeholder(tf.uint8, [None, side, side, 3], _PIXELS)
        images = tf.cast(pixels, tf.float32)
        if (low, high) != (0.0, 255.0):
            images = images / (255.0 / (high - low))
        if low:
            images += low
        tensors = tf.graph_util.import_graph_def(
            frozen.graph.to_def(),
            input_map=dict.fromkeys(frozen.inputs, images),
            return_elements=list(frozen.outputs.values()),
            name="model",
        )
        for role, tensor in zip(frozen.outputs, tensors, strict=True):
            exact = tf.cast(tensor, tf.float32)  # nothing, but where the model ends in half of it
            tf.reshape(exact, [-1, frozen.widths[role]], name=role)
    weights = {f"model/{name}": array for name, array in frozen.graph.weights.items()}
    graph = Graph(assembled.as_graph_def(), frozen.outputs, weights)
    fold(graph)
    return graph


def _for_device(graph: Graph, bfloat16: bool) -> None:
    """Put `graph` in the arithmetic asked for and, on CPU, into the operations that suit it."""
    if bfloat16:
        to_bfloat16(graph)
    if not GPUS:
        multiply_by_picture(graph)
        if can_fuse():
            shapes = graph.shapes()
            fuse_convolutions(graph, shapes)
            if has_separable(graph, shapes) and (width := chosen_width()):
                fuse_separable(graph, shapes, width)
        if bfloat16:
            take_larger_by_bits(graph)


def _functions(graph: Graph, outputs: Sequence[str], copies: int) -> list[Run]:
    """TensorFlow's function of `graph`, `copies` times over one set of weights."""
    graph_def = graph.to_def()
    weights = {name: constant(array) for name, array in graph.weights.items()}
    graph.weights.clear()  # TensorFlow holds them now
    shape = tf.TensorShape(graph.nodes[_PIXELS].attr["shape"].shape)
    first = function_of(graph_def, weights, _PIXELS, tf.TensorSpec(shape, tf.uint8), outputs)
    return [_on_arrays(function) for function in (first, *(twin(first) for _ in range(1, copies)))]


def _on_arrays(function: Callable[[tf.Tensor], Mapping[str, tf.Tensor]]) -> Run:
    """`function` from array to arrays, its want of memory told as OutOfMemory."""

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return {name: out.numpy() for name, out in function(constant(pixels)).items()}
        except tf.errors.ResourceExhaustedError as error:
            raise OutOfMemory(str(error)[:300]) from error

    return run


__all__ = [
    "BFLOAT16",
    "EMBEDDING",
    "GPU_UNSEEN",
    "LOGITS",
    "OPENVINO",
    "TENSORFLOW",
    "Hints",
    "LoadSpec",
    "LoadedModel",
    "ModelError",
    "ModelInfo",
    "OutOfMemory",
    "default_batch_size",
    "default_copies",
    "has_gpu",
    "load",
    "prepare",
]
