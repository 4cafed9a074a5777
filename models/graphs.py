"""A GraphDef as something to rewrite: nodes by name, constants as arrays, readers of each node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from models.runtime import op_def_registry, tf

Shapes = dict[str, list[int | None]]  # tensor name, as nodes read it, to static shape
_HEAVY_BYTES = 1000
# TF1's control flow: what hangs on one of these may be a loop's or a branch's, and not run at all.
_FLOW_OPS = {"Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "ControlTrigger"}
_FLOW_OPS |= {f"Ref{op}" for op in _FLOW_OPS}
PLAIN_KINDS = "fiub"  # dtypes that NumPy's files hold by themselves; others stay in the graph


def node_name(tensor: str) -> str:
    """The node of a tensor's name: `a:1` and `^a` are of `a`."""
    return tensor.removeprefix("^").partition(":")[0]


def port(tensor: str) -> str:
    """Which output of its node a tensor is, `^` for a control edge."""
    return "^" if tensor.startswith("^") else tensor.partition(":")[2] or "0"


def waits(node: Any) -> bool:
    """Whether `node` waits for another that it reads nothing of (its last inputs, then)."""
    return bool(node.input) and node.input[-1].startswith("^")


def kind(node: Any, attribute: str = "T") -> int:
    """The type enum in an attribute of `node`, 0 where it has none (asking a map would add it)."""
    return int(node.attr[attribute].type) if attribute in node.attr else 0


def _acts(op: str) -> bool:
    """Whether an operation has effects or directs others; one that is not known here may."""
    known = op_def_registry.get(op)
    acts = known is None or known.is_stateful or op in _FLOW_OPS
    return acts and not op.startswith("LookupTableFind")  # it only reads


class Graph:
    """A copy of a GraphDef without variables, for rewriting; `keep` names nodes that must stay.

    Weights lie beside it, as placeholders in the graph and as arrays in `weights`: TensorFlow, like
    protobuf, copies what lies in a graph whenever it touches it.
    """

    def __init__(
        self,
        graph: Any,
        keep: Iterable[str] = (),
        weights: Mapping[str, np.ndarray] | None = None,
    ):
        self.keep = frozenset(keep)
        self.weights = dict(weights or {})
        self.nodes: dict[str, Any] = {}
        self.library = graph.library
        self._versions = graph.versions
        for node in graph.node:
            if self._set_aside(node):
                continue
            copy = type(node)()
            copy.CopyFrom(node)
            copy.attr.pop("_class", None)  # colocation, with nodes that may go
            self.nodes[node.name] = copy

    def prune(self, keep: Iterable[str] = ()) -> Graph:
        """Drop what the kept nodes do not need, `keep` from now on if given; returns itself."""
        self.keep = frozenset(keep) or self.keep
        wanted = list(self.keep)
        seen = set(wanted)
        while wanted:
            fresh = {node_name(name) for name in self.nodes[wanted.pop()].input} - seen
            seen |= fresh
            wanted += fresh
        self.nodes = {name: node for name, node in self.nodes.items() if name in seen}
        self.weights = {name: array for name, array in self.weights.items() if name in seen}
        return self

    def to_def(self, within: Collection[str] = ()) -> Any:
        """The GraphDef, with a placeholder for each of the weights, but those named in `within` as
        constants.
        """
        graph = tf.compat.v1.GraphDef(versions=self._versions, library=self.library)
        graph.node.extend(self.nodes.values())
        for node in graph.node:
            if node.name in within:
                node.op = "Const"
                del node.attr["shape"]
                value = tf.make_tensor_proto(self.weights[node.name])
                node.attr["value"].tensor.CopyFrom(value)
        return graph

    def readers(self) -> dict[str, list[Any]]:
        """Node name to the nodes that read it, once for each input."""
        found: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes.values():
            for name in node.input:
                found[node_name(name)].append(node)
        return found

    def shapes(self) -> Shapes:
        """The shapes of tensors of known rank. TensorFlow takes its time to find them."""
        with tf.Graph().as_default() as shaped:
            tf.graph_util.import_graph_def(self.to_def(), name="")
        return {
            tensor.name.removesuffix(":0"): tensor.shape.as_list()
            for op in shaped.get_operations()
            for tensor in op.outputs
            if tensor.shape.rank is not None
        }

    def producer(self, tensor: str) -> Any:
        """The node that makes `tensor`."""
        return self.nodes[node_name(tensor)]

    def constant(self, tensor: str) -> np.ndarray | None:
        """The value of `tensor` where it is a constant, and everywhere in the graph the same one.

        A constant that waits is a loop's or a branch's, and none from outside can take its place.
        """
        node = self.producer(tensor)
        while node.op == "Identity":
            node = self.producer(node.input[0])
        if node.name in self.weights:
            return self.weights[node.name]
        free = node.op == "Const" and not waits(node)
        return tf.make_ndarray(node.attr["value"].tensor) if free else None

    def free(self, name: str) -> str:
        """`name`, or one that begins so where a node has it."""
        while name in self.nodes:
            name += "_"
        return name

    def add(self, op: str, name: str, inputs: list[str]) -> Any:
        """A new node called `name`, where that is free; its attributes are yet to be set."""
        node = tf.compat.v1.NodeDef(op=op, name=self.free(name), input=inputs)
        self.nodes[node.name] = node
        return node

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """A new constant, called `name` where that is free; returns its name."""
        if value.nbytes >= _HEAVY_BYTES:
            return self._add_weight(name, value)
        node = self.add("Const", name, [])
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        return str(node.name)

    def _set_aside(self, node: Any) -> bool:
        """Make a weight of `node` where it is a large constant that waits for nothing."""
        if node.op != "Const" or waits(node) or node.ByteSize() < _HEAVY_BYTES:
            return False
        array = tf.make_ndarray(node.attr["value"].tensor)
        if array.dtype.kind not in PLAIN_KINDS:
            return False
        self.nodes.pop(node.name, None)
        self._add_weight(node.name, array)
        return True

    def _add_weight(self, name: str, value: np.ndarray) -> str:
        node = self.add("Placeholder", name, [])
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(value.shape).as_proto())
        self.weights[node.name] = value
        return str(node.name)

    def bypass_identities(self) -> None:
        """Let everything read past identities, and wait for nothing that only computes.

        Kept ones stay, and so do those that wait for something: a function's call that was inlined
        lets even its constants wait for its pictures.
        """
        past: dict[str, str] = {}
        acting = self._acting()
        for node in self.nodes.values():
            if waits(node):
                node.input[:] = [
                    read
                    for read in node.input
                    if not (read.startswith("^") and node_name(read) not in acting)
                ]
        for node in list(self.nodes.values()):
            self._set_aside(node)

        def source(tensor: str) -> str:
            node = self.nodes[node_name(tensor)]
            if node.op != "Identity" or tensor.startswith("^") or len(node.input) != 1:
                return tensor
            if node.name not in past:
                past[node.name] = source(node.input[0])
            return past[node.name]

        for node in self.nodes.values():
            node.input[:] = [source(name) for name in node.input]

    def _acting(self) -> set[str]:
        """The nodes that do more than compute, or hang on one that does."""
        readers = self.readers()
        acting = {name for name, node in self.nodes.items() if _acts(node.op)}
        waiting = list(acting)
        while waiting:
            fresh = {reader.name for reader in readers[waiting.pop()]} - acting
            acting |= fresh
            waiting += fresh
        return acting
