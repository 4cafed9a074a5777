"""The same function by OpenVINO, another engine for CPUs: an optional extra, `[openvino]`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.freezing import ModelError
from models.graphs import Graph
from storage import temporaries
from storage.imports import without


def functions(
    graph: Graph, outputs: Sequence[str], bfloat16: bool, copies: int
) -> list[Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """`copies` functions that may run at once, on one thread each, over one set of weights.

    Each maps pixels, uint8 [N, S, S, 3], to float32 [N, width] by output name. Raises ModelError
    where OpenVINO is missing, or does not know an operation of the graph.
    """
    engine = _Engine(graph, outputs, bfloat16, copies)
    return [_Lane(engine) for _ in range(copies)]


class _Engine:
    """A graph as OpenVINO reads it, compiled once for each size of a batch."""

    def __init__(self, graph: Graph, outputs: Sequence[str], bfloat16: bool, copies: int):
        try:
            with without("openvino_telemetry"):  # importing it would tell its makers of that
                import openvino
        except ImportError as error:
            raise ModelError(
                f"--engine openvino: it is not installed here ({error}); pip install openvino, or "
                "leave the flag out"
            ) from None
        # As each call does. Two threads that are the first to ask wait for each other forever.
        openvino.Type.u8.to_dtype()
        self.outputs = tuple(outputs)
        self._core = openvino.Core()
        self._config = {
            "INFERENCE_PRECISION_HINT": openvino.Type.bf16 if bfloat16 else openvino.Type.f32,
            "NUM_STREAMS": copies,
            "INFERENCE_NUM_THREADS": copies,
            "ENABLE_CPU_PINNING": False,  # the threads that decode run on the same cores
        }
        self._lock = threading.Lock()
        self._compiled: dict[int, Any] = {}
        with temporaries.scratch() as folder:
            path = folder / "graph.pb"
            path.write_bytes(graph.to_def(graph.weights).SerializeToString())
            graph.weights.clear()
            try:
                self._model = self._core.read_model(path)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise ModelError(
                    f"--engine openvino: it cannot read this model ({reason})"
                ) from None

    def request(self, batch: int) -> Any:
        """What runs batches of `batch` pictures, one at a time."""
        with self._lock:
            if batch not in self._compiled:
                model = self._model.clone()
                (pixels,) = model.inputs
                shape = pixels.partial_shape
                shape[0] = batch
                model.reshape({pixels: shape})
                self._compiled[batch] = self._core.compile_model(model, "CPU", self._config)
            return self._compiled[batch].create_infer_request()


class _Lane:
    """One of the functions; it keeps what it runs on, for each size of a batch."""

    def __init__(self, engine: _Engine):
        self._engine = engine
        self._requests: dict[int, Any] = {}

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        size = len(pixels)
        if size not in self._requests:
            self._requests[size] = self._engine.request(size)
        request = self._requests[size]
        request.infer({0: np.ascontiguousarray(pixels)}, share_inputs=True)
        # Copies: the next call writes over what this one gave.
        return {
            name: np.array(request.get_tensor(f"{name}:0").data, np.float32)
            for name in self._engine.outputs
        }
