"""What a model is, as one digest of its graph and weights; neither path, time nor names count."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.graphs import Graph, node_name, port
from models.runtime import tf


def fingerprint(graph: Graph, outputs: Mapping[str, str]) -> str:
    """SHA-256, hex, over operations, attributes, wiring, constants and weights behind `outputs`.

    `outputs`: a role to a tensor's name.
    """
    nodes = graph.nodes
    bodies = _Bodies(graph.library)
    digests: dict[str, bytes] = {}
    opened: set[str] = set()
    stack = [node_name(name) for name in outputs.values()]
    while stack:
        node = nodes[stack[-1]]
        if node.name not in opened:
            opened.add(node.name)
            stack += [name for name in map(node_name, node.input) if name not in opened]
            continue
        stack.pop()
        if node.name not in digests:
            weight = graph.weights.get(node.name)
            digests[node.name] = (
                _node_digest(node, digests, bodies) if weight is None else _array_digest(weight)
            )
    total = hashlib.sha256()
    for role, name in sorted(outputs.items()):
        total.update(f"{role} {port(name)} ".encode() + digests[node_name(name)])
    return total.hexdigest()


class _Bodies:
    """Digests of a graph's functions, whose names tell only when they were traced."""

    def __init__(self, library: Any):
        self._functions = {function.signature.name: function for function in library.function}
        self._digests: dict[str, bytes] = {}

    def digest(self, name: str) -> bytes:
        """Of what the function `name` does; of the name where it is not one of the graph's."""
        if name not in self._functions:
            return name.encode()
        if name not in self._digests:
            self._digests[name] = b"recursion"
            function = self._functions[name]
            hasher = hashlib.sha256(repr([a.name for a in function.signature.input_arg]).encode())
            for node in function.node_def:
                hasher.update(f"{node.name} {list(node.input)}".encode())
                hasher.update(_node_digest(node, {}, self))
            for output, tensor in sorted(function.ret.items()):
                hasher.update(f"{output} {tensor}".encode())
            self._digests[name] = hasher.digest()
        return self._digests[name]


def _array_digest(array: np.ndarray) -> bytes:
    hasher = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    text = array.dtype == object
    hasher.update(repr(array.tolist()).encode() if text else array.tobytes())
    return hasher.digest()


def _node_digest(node: Any, digests: Mapping[str, bytes], bodies: _Bodies) -> bytes:
    hasher = hashlib.sha256(bodies.digest(node.op))  # a function may be called as an operation
    for name in sorted(node.attr):
        if name == "value" and node.op == "Const":
            hasher.update(_array_digest(tf.make_ndarray(node.attr[name].tensor)))
        elif node.attr[name].HasField("func"):
            hasher.update(name.encode() + bodies.digest(node.attr[name].func.name))
        elif node.attr[name].list.func:
            for function in node.attr[name].list.func:
                hasher.update(name.encode() + bodies.digest(function.name))
        elif not name.startswith("_"):
            hasher.update(name.encode() + node.attr[name].SerializeToString(deterministic=True))
    for name in node.input:
        # A node that is still open is where a loop closes.
        hasher.update(port(name).encode() + digests.get(node_name(name), b"loop"))
    return hasher.digest()
