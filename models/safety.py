"""Which operations of a model reach files or the network: a model is code.

A SavedModel may hold operations that write a file when it is called, or even when it is loaded;
they are looked for in the message, before anything of it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from storage.errors import RequestError

# Of tensorflow/core/ops: what reads, writes, connects, or calls out of the graph.
_UNSAFE = re.compile(
    r"ReadFile|WriteFile|MatchingFiles|PrintV2|.*PyFunc.*|DebugIdentity.*|DebugNumericSummary.*"
    r"|.*Reader(V2)?|InitializeTableFromTextFile.*|InitializeTableFromDataset"
    r"|(TFRecord|TextLine|FixedLengthRecord|LMDB|Sql|Load|Snapshot|CSV|Cache|DataService)"
    r"Dataset(V\d|Reader)?|.*(Save|Snapshot)Dataset.*|Experimental.*(LMDB|Sql|CSV|Cache)Dataset.*"
    r"|Save|SaveSlices|Restore|RestoreSlice|DistributedSave|.*Checkpoint.*Read.*"
    r"|.*Summary(Writer|DbWriter|FileWriter).*|Write.*Summary|ImportEvent|FlushSummaryWriter"
    r"|.*Rpc.*|_?(Host)?(Send|Recv)|.*BigQuery.*|Gcs.*|.*Decode(Video|Wav)File.*"
    r"|DynamicLibrary.*|TRTEngineOp|.*TRTResource.*|RegisterDataset.*|DumpToFile.*|.*FileSystem.*"
)
# A saver's, which every model has; in an inference graph they have no business.
_SAVERS = ("SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename")


def unsafe_ops(proto: Any) -> list[str]:
    """The types of operation in a SavedModel message that reach files or the network, sorted."""
    return sorted({op for op in _ops(proto) if _UNSAFE.fullmatch(op)})


def _ops(proto: Any) -> Iterable[str]:
    for meta in proto.meta_graphs:
        yield from (node.op for node in meta.graph_def.node)
        for function in meta.graph_def.library.function:
            yield from (node.op for node in function.node_def)


def check_model(directory: str, proto: Any, allow: bool) -> None:
    """Raise RequestError where the model holds unsafe operations, unless they are allowed."""
    _refuse(directory, unsafe_ops(proto), allow)


def check_graph(directory: str, graph: Any, allow: bool) -> None:
    """The same for a frozen inference graph, where saving and restoring count too."""
    _refuse(directory, unsafe_types(graph), allow)


def unsafe_types(graph: Any) -> list[str]:
    """The types of operation in a frozen GraphDef that reach files or the network, sorted."""
    found = {n.op for n in graph.node if _UNSAFE.fullmatch(n.op) or n.op in _SAVERS}
    return sorted(found)


def _refuse(directory: str, found: list[str], allow: bool) -> None:
    if found and not allow:
        raise RequestError(
            f"--model {directory}: its graph holds {', '.join(found)}, which can reach files or "
            "the network of whoever runs it; --allow_unsafe_ops runs it all the same"
        )
