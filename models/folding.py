"""Batch norm folded into the convolutions before it, once, instead of computed for each image.

`bn(conv(x, w)) = conv(x, w s) + (beta - mean s)` with `s = gamma / sqrt(variance + epsilon)`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from models.fingerprint import node_name
from models.runtime import tf

_BATCH_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


def fold_batch_norms(graph: Any) -> Any:
    """A GraphDef that computes the same as `graph`, a frozen one, with fewer operations.

    Folds where the batch norm's parameters are constants and its input is a convolution, or several
    concatenated, that nothing else reads. Computed in float64, stored in the weights' type.
    """
    folded = type(graph)()
    folded.CopyFrom(graph)
    folder = _Folder(folded)
    for node in list(folded.node):
        if node.op in _BATCH_NORMS and not node.attr["is_training"].b:
            folder.fold(node)
    return folded


class _Folder:
    def __init__(self, graph: Any):
        self.graph = graph
        self.nodes = {node.name: node for node in graph.node}
        self.readers = Counter(node_name(name) for node in graph.node for name in node.input)
        self.ports = {
            node_name(name)
            for node in graph.node
            for name in node.input
            if ":" in name and not name.endswith(":0")
        }

    def fold(self, norm: Any) -> None:
        """Turn `norm` into an identity, where it can be folded."""
        parameters = [self.constant(name) for name in norm.input[1:5]]
        convs = self.convolutions(norm.input[0])
        if norm.name in self.ports or not convs or any(p is None for p in parameters):
            return
        gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
        scale = gamma / np.sqrt(variance + norm.attr["epsilon"].f)
        bias = beta - mean * scale
        start = 0
        for conv in convs:
            stop = start + self.width(conv)
            self.scale(conv, scale[start:stop], bias[start:stop])
            start = stop
        kind = norm.attr["T"].type
        del norm.input[1:]
        norm.op = "Identity"
        norm.attr.clear()
        norm.attr["T"].type = kind

    def convolutions(self, name: str) -> list[Any]:
        """The convolutions whose results, concatenated, are the tensor `name`; else none."""
        node = self.nodes[node_name(name)]
        if self.readers[node.name] != 1:
            return []
        if node.op == "ConcatV2":
            axis = self.constant(node.input[-1])
            parts = [self.convolutions(part) for part in node.input[:-1]]
            last = axis is not None and int(axis) in (3, -1)
            return [conv for part in parts for conv in part] if last and all(parts) else []
        plain = node.op == "Conv2D" and node.attr["data_format"].s in (b"NHWC", b"")
        return [node] if plain and self.constant(node.input[1]) is not None else []

    def width(self, conv: Any) -> int:
        kernel = self.constant(conv.input[1])
        assert kernel is not None
        return int(kernel.shape[-1])

    def constant(self, name: str) -> np.ndarray | None:
        node = self.nodes[node_name(name)]
        while node.op == "Identity":
            node = self.nodes[node_name(node.input[0])]
        return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None

    def scale(self, conv: Any, scale: np.ndarray, bias: np.ndarray) -> None:
        """Scale the kernel of `conv` and put a bias behind it, under the name it had."""
        kernel = self.constant(conv.input[1])
        assert kernel is not None
        name = conv.name
        weights = self.add_constant(f"{name}/folded", (kernel * scale).astype(kernel.dtype))
        offset = self.add_constant(f"{name}/bias", bias.astype(kernel.dtype))
        biased = self.graph.node.add(op="BiasAdd", name=name, input=[f"{name}/conv", offset])
        biased.attr["T"].CopyFrom(conv.attr["T"])
        conv.name = f"{name}/conv"
        conv.input[1] = weights
        self.nodes |= {biased.name: biased, conv.name: conv}

    def add_constant(self, name: str, value: np.ndarray) -> str:
        node = self.graph.node.add(op="Const", name=name)
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        self.nodes[name] = node
        return name
