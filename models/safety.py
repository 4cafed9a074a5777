"""Which operations of a model reach files or the network: a model is code.

A SavedModel may hold operations that write a file when it is called, or even when it is loaded;
they are looked for in the message, before anything of it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from models.runtime import variable_pb2
from storage.errors import RequestError

# Of tensorflow/core/ops: what reads, writes, lists, connects, calls out of the graph, or runs a
# graph that is hidden in a string.
_UNSAFE = re.compile(
    r"ReadFile|WriteFile|.*MatchingFiles.*|PrintV2|.*PyFunc.*|Debug(Identity|NumericSummary|Nan).*"
    r"|.*Reader(V2)?|Reader(Read|Restore).*|RecordInput|InitializeTableFrom(TextFile|Dataset).*"
    r"|(TFRecord|TextLine|FixedLengthRecord|LMDB|Sql|Load|.*Snapshot.*|CSV|Cache|DataService)"
    r"Dataset(V\d|Reader)?|.*(Save|Snapshot)Dataset.*|Experimental.*(LMDB|Sql|CSV|Cache)Dataset.*"
    r"|DatasetFromGraph|.*DatasetToTFRecord|RegisterDataset.*"
    r"|Save|SaveSlices|Restore|RestoreSlice|DistributedSave|DTensorRestore.*|.*Checkpoint.*Read.*"
    r"|LoadAndRemapMatrix|GenerateVocabRemapping|Skipgram|FixedUnigramCandidateSampler"
    r"|DecodeProto.*|EncodeProto.*|.*Summary(Writer|DbWriter|FileWriter).*|Write.*Summary"
    r"|ImportEvent|.*Rpc.*|RemoteCall|_?(Host)?(Send|Recv)|Copy(Host)?|Dump.*|.*FileSystem.*"
    r"|.*BigQuery.*|Gcs.*|.*Decode(Video|Wav)File.*|DynamicLibrary.*|TRTEngineOp|.*TRTResource.*"
)
# A saver's, which almost every model has beside what is loaded and called; there they have no
# business.
_RESTORES = {"RestoreV2", "ShardedFilename", "ShardedFilespec"}
_SAVES = {"SaveV2", "MergeV2Checkpoints"}
_INITIALIZERS = ("saved_model_main_op", "legacy_init_op")


def unsafe_ops(proto: Any) -> list[str]:
    """The types of operation in a SavedModel message that reach files or the network, sorted.

    Saving and restoring count where a call or loading would run them.
    """
    found: set[str] = set()
    for meta in proto.meta_graphs:
        found |= {op for op in _types(meta.graph_def) if _UNSAFE.fullmatch(op)}
        found |= _Savers(meta).misplaced()
    return sorted(found)


def unsafe_types(graph: Any) -> list[str]:
    """The types of operation in a frozen GraphDef that reach files or the network, sorted."""
    found = {op for op in _types(graph) if _UNSAFE.fullmatch(op) or op in _RESTORES | _SAVES}
    return sorted(found)


def check_model(directory: str, proto: Any, allow: bool) -> None:
    """Raise RequestError where the model holds unsafe operations, unless they are allowed."""
    _refuse(directory, unsafe_ops(proto), allow)


def check_graph(directory: str, graph: Any, allow: bool) -> None:
    """The same for a frozen inference graph, where saving and restoring count too."""
    _refuse(directory, unsafe_types(graph), allow)


def _refuse(directory: str, found: list[str], allow: bool) -> None:
    if found and not allow:
        raise RequestError(
            f"--model {directory}: its graph holds {', '.join(found)}, which can reach files or "
            "the network of whoever runs it; --allow_unsafe_ops runs it all the same"
        )


def _types(graph: Any) -> Iterator[str]:
    yield from (node.op for node in graph.node)
    for function in graph.library.function:
        yield from (node.op for node in function.node_def)


class _Savers:
    """What of a MetaGraphDef loading and calling can run, to find savers' operations in it."""

    def __init__(self, meta: Any):
        self.meta = meta
        self.nodes = {node.name: node for node in meta.graph_def.node}
        self.functions = {f.signature.name: f for f in meta.graph_def.library.function}

    def misplaced(self) -> set[str]:
        """The savers' operations that a call, or loading besides restoring, would run."""
        running = self.reached(self.entries(), self.methods())
        restoring = self.reached([self.meta.saver_def.restore_op_name], [])
        return running & (_RESTORES | _SAVES) | restoring & _SAVES

    def entries(self) -> Iterator[str]:
        """Names of tensors that are fetched: signatures', initializers', variables'."""
        for signature in self.meta.signature_def.values():
            yield from (info.name for info in signature.outputs.values())
        for name, collection in self.meta.collection_def.items():
            if name in _INITIALIZERS:
                yield from collection.node_list.value
            elif name.endswith("variables"):
                for value in collection.bytes_list.value:
                    variable = variable_pb2.VariableDef.FromString(value)
                    yield from (variable.initializer_name, variable.snapshot_name)

    def methods(self) -> Iterator[str]:
        """Names of the functions that the objects of a TF2 model have."""
        objects = self.meta.object_graph_def
        yield from objects.concrete_functions
        for node in objects.nodes:
            yield from node.function.concrete_functions
            yield node.bare_concrete_function.concrete_function_name
            yield node.captured_tensor.concrete_function

    def reached(self, tensors: Iterable[str], functions: Iterable[str]) -> set[str]:
        """The types of operation behind `tensors` of the graph and in `functions`."""
        seen: set[str] = set()
        called: set[str] = set()
        types: set[str] = set()
        stack, waiting = list(tensors), list(functions)
        while stack:
            name = stack.pop().removeprefix("^").partition(":")[0]
            node = self.nodes.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            types.add(node.op)
            stack += node.input
            waiting += _called(node)
        while waiting:
            name = waiting.pop()
            function = self.functions.get(name)
            if function is None or name in called:
                continue
            called.add(name)
            for node in function.node_def:
                types.add(node.op)
                waiting += _called(node)
        return types


def _called(node: Any) -> Iterator[str]:
    yield node.op  # a function may be called by its name, as an operation
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)
