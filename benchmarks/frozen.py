"""The graph of rival (a), as a file that other engines read too.

    python -m benchmarks.frozen --model DIR --output FROZEN.pb

A frozen graph as `convert_variables_to_constants_v2` leaves it has its batch norms still, behind
Identity operations that TensorFlow's own folding cannot see through. In float32 the remapper makes
up for it; in oneDNN's bfloat16 a batch norm of its own costs more than its convolution (17 ms an
image in all against 7). So the Identities are taken out and TensorFlow's `fold_batch_norms` called.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

OUTPUT = "Identity"  # as the freezing names it


def frozen_graph(model: str) -> Any:
    """The serving signature of a SavedModel as a GraphDef from one Placeholder to `OUTPUT`.

    Without variables, Identities and, as far as TensorFlow folds them, batch norms.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )
    from tensorflow.python.tools.optimize_for_inference_lib import fold_batch_norms

    tf.get_logger().setLevel("ERROR")
    loaded = tf.saved_model.load(model)
    frozen = convert_variables_to_constants_v2(loaded.signatures["serving_default"])
    (output,) = frozen.outputs
    assert output.name == f"{OUTPUT}:0"
    whole = frozen.graph.as_graph_def()
    nodes = {node.name: node for node in whole.node}

    def source(tensor: str) -> str:
        node = nodes.get(tensor.partition(":")[0])
        passes = node is not None and node.op == "Identity" and node.name != OUTPUT
        return source(node.input[0]) if passes and node is not None else tensor

    graph = tf.compat.v1.GraphDef(versions=whole.versions)
    for node in whole.node:
        if node.op != "NoOp" and (node.op != "Identity" or node.name == OUTPUT):
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [source(name) for name in node.input if not name.startswith("^")]
    return fold_batch_norms(graph)


def main() -> None:
    """Write the frozen graph."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    request = parser.parse_args()
    request.output.write_bytes(frozen_graph(request.model).SerializeToString())


if __name__ == "__main__":
    main()
