"""What a model is, as one digest of its graph and weights; neither path, time nor names count."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from models.graphs import node_name, port
from models.runtime import tf


def fingerprint(graph: Any, outputs: Mapping[str, str]) -> str:
    """SHA-256, hex, over operations, attributes, wiring and constants behind `outputs`.

    `graph` is a GraphDef without variables, `outputs` a role to a tensor's name.
    """
    nodes = {node.name: node for node in graph.node}
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
            digests[node.name] = _node_digest(node, digests)
    total = hashlib.sha256()
    for role, name in sorted(outputs.items()):
        total.update(f"{role} {port(name)} ".encode() + digests[node_name(name)])
    return total.hexdigest()


def _node_digest(node: Any, digests: Mapping[str, bytes]) -> bytes:
    hasher = hashlib.sha256(node.op.encode())
    for name in sorted(node.attr):
        if name == "value" and node.op == "Const":
            array = tf.make_ndarray(node.attr[name].tensor)
            hasher.update(f"{array.dtype}{array.shape}".encode())
            text = array.dtype == object
            hasher.update(repr(array.tolist()).encode() if text else array.tobytes())
        elif not name.startswith("_"):
            hasher.update(name.encode() + node.attr[name].SerializeToString(deterministic=True))
    for name in node.input:
        # A node that is still open is where a loop closes.
        hasher.update(port(name).encode() + digests.get(node_name(name), b"loop"))
    return hasher.digest()
