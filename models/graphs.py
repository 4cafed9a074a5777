"""A GraphDef as something to rewrite: nodes by name, constants as arrays, readers of each node."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from models.runtime import tf


def node_name(tensor: str) -> str:
    """The node of a tensor's name: `a:1` and `^a` are of `a`."""
    return tensor.removeprefix("^").partition(":")[0]


def port(tensor: str) -> str:
    """Which output of its node a tensor is, `^` for a control edge."""
    return "^" if tensor.startswith("^") else tensor.partition(":")[2] or "0"


def kind(node: Any, attribute: str = "T") -> int:
    """The type enum in an attribute of `node`, 0 where it has none (asking a map would add it)."""
    return int(node.attr[attribute].type) if attribute in node.attr else 0


class Graph:
    """A copy of a GraphDef without variables, for rewriting; `keep` names nodes that must stay."""

    def __init__(self, graph: Any, keep: tuple[str, ...] = ()):
        self.keep = frozenset(keep)
        self._versions = graph.versions
        self.nodes: dict[str, Any] = {}
        for node in graph.node:
            copy = type(node)()
            copy.CopyFrom(node)
            self.nodes[node.name] = copy

    def to_def(self) -> Any:
        """The GraphDef of what the kept nodes need (of everything where none was named)."""
        graph = tf.compat.v1.GraphDef(versions=self._versions)
        wanted = list(self.keep or self.nodes)
        seen = set(wanted)
        while wanted:
            node = self.nodes[wanted.pop()]
            fresh = {node_name(name) for name in node.input} - seen
            seen |= fresh
            wanted += fresh
        graph.node.extend(node for name, node in self.nodes.items() if name in seen)
        return graph

    def readers(self) -> dict[str, list[Any]]:
        """Node name to the nodes that read it, once for each input."""
        found: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes.values():
            for name in node.input:
                found[node_name(name)].append(node)
        return found

    def producer(self, tensor: str) -> Any:
        """The node that makes `tensor`."""
        return self.nodes[node_name(tensor)]

    def constant(self, tensor: str) -> np.ndarray | None:
        """The value of `tensor` where it is a constant."""
        node = self.producer(tensor)
        while node.op == "Identity":
            node = self.producer(node.input[0])
        return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None

    def add(self, op: str, name: str, inputs: list[str]) -> Any:
        """A new node, its attributes yet to be set."""
        assert name not in self.nodes, name
        node = tf.compat.v1.NodeDef(op=op, name=name, input=inputs)
        self.nodes[name] = node
        return node

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """A new constant; returns its name."""
        node = self.add("Const", name, [])
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        return name

    def bypass_identities(self) -> None:
        """Let everything read past identities, and wait for no operation that does nothing.

        Kept ones stay, and so do those that wait for something.
        """
        past: dict[str, str] = {}
        idle = {f"^{name}" for name, node in self.nodes.items() if node.op == "NoOp"}
        idle -= {f"^{name}" for name, node in self.nodes.items() if node.input}
        for node in self.nodes.values():
            if not idle.isdisjoint(node.input):
                node.input[:] = [name for name in node.input if name not in idle]

        def source(tensor: str) -> str:
            node = self.nodes[node_name(tensor)]
            if node.op != "Identity" or tensor.startswith("^") or len(node.input) != 1:
                return tensor
            if node.name not in past:
                past[node.name] = source(node.input[0])
            return past[node.name]

        for node in self.nodes.values():
            node.input[:] = [source(name) for name in node.input]
