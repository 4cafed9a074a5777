"""TensorFlow made ready: imported without its chatter, GPU memory growing instead of all taken."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.cores import available_cores
from storage.imports import without

# Lines of the native libraries before their log levels are in force.
_CHATTER = re.compile(rb"^([IWE]\d{4} |WARNING: All log messages before|To enable the following)")


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold stderr back; then let through what is no chatter, or all of it after an error."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        keep_all = True
        try:
            yield
            keep_all = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if keep_all or not _CHATTER.match(line):
                    os.write(2, line)


def has_bfloat16(cpuinfo: str) -> tuple[bool, bool]:
    """Whether oneDNN has kernels for bfloat16 on a CPU (its guide names the instructions), and
    whether they are faster than float32's: with AMX, or with AMD's AVX-512 for it.

    Intel's without AMX multiplies half as many numbers a second in bfloat16 as in float32, and
    AVX-512 without instructions for it widens each number first: docs/PERFORMANCE.md tells.
    """
    flags = set(cpuinfo.partition("\nflags")[2].partition("\n")[0].split())
    kernels = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags or "avx_ne_convert" in flags
    amd = "AuthenticAMD" in cpuinfo and "avx512_bf16" in flags
    return kernels, kernels and (amd or "amx_bf16" in flags)


def _share_arenas(most: int) -> None:
    """Let the C library's threads share `most` arenas, not eight a core: each keeps what it freed.

    Some 20 of a job's 1,050 MiB on two cores, at no cost that could be seen.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):  # a C library without
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, most)


_M_ARENA_MAX = -8  # of malloc.h
CORES = available_cores()
_share_arenas(max(2, CORES))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if platform.machine() == "x86_64":  # TensorFlow's own choice only from AVX-512 VNNI on
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
_has_gpu = Path("/dev/nvidiactl").exists()  # there its messages matter
# TensorFlow imports Keras only so that models with an optimizer of Keras's are restored with it.
with _without_chatter(), without("keras.src.optimizers", "tf_keras.src.optimizers"):
    import tensorflow as tf
    from tensorflow.core.framework import variable_pb2
    from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
    from tensorflow.python.eager import context
    from tensorflow.python.eager.polymorphic_function import concrete_function
    from tensorflow.python.framework import convert_to_constants, op_def_registry, ops

    GPUS = tf.config.list_physical_devices("GPU") if _has_gpu else []
    # GPUs would compute float32 in TF32, 1e-3 off, and rows of both devices share an output.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with contextlib.suppress(RuntimeError):  # where the caller has used TensorFlow already
        for _gpu in GPUS:
            # Before anything touches the device; otherwise one process takes all of its memory.
            tf.config.experimental.set_memory_growth(_gpu, True)
        if not GPUS:
            # Batches side by side on one thread each do more than one batch on all: no thread
            # waits for another at the end of each of a thousand operations.
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(CORES)
        # The graphs are folded and fused already; looking for more took most of a first call.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        if not _has_gpu:
            tf.config.set_visible_devices([], "GPU")
            tf.zeros([]).numpy()  # starts the CPU device, which complains of the missing driver


# A GPU that nobody hides and TensorFlow does not see: CUDA's libraries or its driver are not there.
GPU_UNSEEN = _has_gpu and not GPUS and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
# Whether there are kernels for it; whether layers are computed in it where that is asked for.
_cpuinfo = Path("/proc/cpuinfo").read_text()
BFLOAT16_KERNELS, BFLOAT16 = (found or bool(GPUS) for found in has_bfloat16(_cpuinfo))
AVX512 = "avx512f" in _cpuinfo.split()


def inline_variables(function: Any, leave: Iterable[str] = ()) -> Any:
    """The GraphDef of a ConcreteFunction, calls inlined, captured variables as constants.

    Those whose placeholders are named in `leave` stay as they are. What TensorFlow's
    convert_variables_to_constants_v2 does, less the function that it makes of the graph again.
    """
    # TensorFlow would warn that it cannot write these down; nothing of them is needed.
    keys = tf.compat.v1.GraphKeys
    for name in (keys.GLOBAL_VARIABLES, keys.TRAINABLE_VARIABLES):
        function.graph.clear_collection(name)
    found = convert_to_constants._FunctionConverterDataInEager(
        function,
        lower_control_flow=True,
        aggressive_inlining=False,
        variable_names_denylist=set(leave),
    )
    return convert_to_constants._replace_variables_by_constants(found)[0]


def constant(array: np.ndarray) -> tf.Tensor:
    """`tf.constant` of an array that nobody writes to any more, which it would copy once more."""
    where = context.context()
    where.ensure_initialized()
    return ops.EagerTensor(np.asarray(array, order="C"), where.device_name, None)


def function_of(
    graph: Any,
    weights: Mapping[str, tf.Tensor],
    given: str,
    spec: tf.TensorSpec,
    outputs: Sequence[str],
) -> Any:
    """A ConcreteFunction of the GraphDef `graph`: placeholder `given`, of `spec`, -> `outputs` by
    name. It holds `weights`, which are its other placeholders.
    """

    def run(tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        capture = tf.compat.v1.get_default_graph().capture
        tensors = tf.graph_util.import_graph_def(
            graph,
            input_map={given: tensor, **{name: capture(w) for name, w in weights.items()}},
            return_elements=[f"{name}:0" for name in outputs],
            name="",
        )
        return dict(zip(outputs, tensors, strict=True))

    return tf.compat.v1.wrap_function(run, [spec])


def twin(function: Any) -> Any:
    """A ConcreteFunction of the graph and captures of `function`, with kernels of its own.

    Importing the graph once more would do the same, and take as long as the first time.
    """
    made = concrete_function.ConcreteFunction
    return made.from_func_graph(function.graph, function.function_type, {})


__all__ = [
    "AVX512",
    "BFLOAT16",
    "BFLOAT16_KERNELS",
    "CORES",
    "GPUS",
    "GPU_UNSEEN",
    "constant",
    "inline_variables",
    "meta_graph_pb2",
    "op_def_registry",
    "saved_model_pb2",
    "tf",
    "twin",
    "variable_pb2",
]
