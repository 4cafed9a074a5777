"""Write a network as a model directory: a TF2 SavedModel, or a TF1 hub.Module.

Both are what TF Hub published of NASNet-A and PNASNet-5: the reusable SavedModel interface of
versions 4 and 5, and the hub.Module directory of version 3. Images are float32 [N, S, S, 3], RGB
in [0, 1], in both.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.catalog import Head, NetworkSpec
from models.checkpoint import Values, write_checkpoint
from models.networks import (
    BATCH_NORM_MOMENTUM,
    build,
    default_end_point,
    image_shape,
    is_kernel,
    is_trainable,
    l2_loss,
    variable_shapes,
)
from models.runtime import meta_graph_pb2, saved_model_pb2, tf
from storage import files

MODULE_FORMAT_V3 = 3  # ModuleDef.Format of tensorflow_hub/module_def.proto

v1 = tf.compat.v1


def export_saved_model(spec: NetworkSpec, values: Values, head: Head, directory: str) -> None:
    """Write the reusable TF2 SavedModel of a network, with version 5 of TF Hub's interface.

    What is loaded from it has `obj(images, training=False, return_endpoints=False,
    batch_norm_momentum=0.99)`, which gives [N, F] features or [N, C] logits, or else a dict of
    them ("default") and every end point; `variables`, `trainable_variables` and
    `regularization_losses`; and `signatures["serving_default"](inputs=images)`, a dict of
    "default" alone. With `training` the moving statistics are updated inside the call.

    `values` are float32 by Slim name, at least those of `variable_shapes(spec, head)`. The
    directory appears at the end, complete; raises FileExistsError where something lies there.
    """
    with _appearing(directory) as scratch:
        model, serve = _reusable_model(spec, _needed(spec, values, head), head)
        tf.saved_model.save(model, scratch, signatures={"serving_default": serve})


def export_hub_v1(spec: NetworkSpec, values: Values, head: Head, directory: str) -> None:
    """Write the TF1 hub.Module directory of a network, as version 3 of those on TF Hub.

    The graph variants are tagged {} for inference and {"train"}. Signatures: `default`,
    `image_feature_vector` and, with a classification head, `image_classification`; the latter two
    give every end point beside "default", and also exist as `*_with_bn_hparams`, with a scalar
    input `batch_norm_momentum`.

    `values` are float32 by Slim name, at least those of `variable_shapes(spec, head)`. The
    directory appears at the end, complete; raises FileExistsError where something lies there.
    """
    with _appearing(directory) as scratch:
        saved_model = saved_model_pb2.SavedModel(
            saved_model_schema_version=1,
            meta_graphs=[_meta_graph(spec, head, training) for training in (False, True)],
        )
        os.makedirs(os.path.join(scratch, "assets"))
        write_checkpoint(
            os.path.join(scratch, "variables", "variables"), _needed(spec, values, head)
        )
        for name, data in (
            ("saved_model.pb", saved_model.SerializeToString(deterministic=True)),
            ("tfhub_module.pb", _field(1, MODULE_FORMAT_V3)),
        ):
            with open(os.path.join(scratch, name), "wb") as file:
                file.write(data)


def write_archive(directory: str, archive: str) -> None:
    """Pack a model directory as `tar -czf archive -C directory .` does, as TF Hub's archives are.

    The same files give the same bytes. Raises FileExistsError where the archive exists.
    """
    if os.path.lexists(archive):
        raise FileExistsError(f"{archive} exists")
    with _beside(archive) as packed:
        with (
            open(packed, "wb") as file,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            root = Path(directory)
            for path in (root, *sorted(root.rglob("*"))):
                inside = path.relative_to(root).as_posix()
                _add(tar, path, "./" if path == root else f"./{inside}")
        os.rename(packed, archive)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file or folder as `name`, with nothing of who made it and when."""
    member = tarfile.TarInfo(name)
    if path.is_dir():
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
    else:
        member.size = path.stat().st_size
        with path.open("rb") as source:
            tar.addfile(member, source)


@contextmanager
def _beside(path: str) -> Iterator[str]:
    """A path to write to, in a temporary folder on the same disk as `path`."""
    parent = os.path.dirname(os.path.realpath(path))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as folder:
        yield os.path.join(folder, "unfinished")


@contextmanager
def _appearing(directory: str) -> Iterator[str]:
    """A new folder to fill, which becomes `directory` once the block ends well."""
    if os.path.isdir(directory) and not files.occupied(directory):
        shutil.rmtree(directory)
    if os.path.lexists(directory):
        raise FileExistsError(f"{directory} exists and is not an empty directory")
    with _beside(directory) as scratch:
        os.mkdir(scratch)
        yield scratch
        os.rename(scratch, directory)


def _needed(spec: NetworkSpec, values: Values, head: Head) -> Values:
    return {name: values[name] for name in variable_shapes(spec, head)}


def _reusable_model(
    spec: NetworkSpec, values: Values, head: Head
) -> tuple[tf.train.Checkpoint, Callable[[tf.Tensor], dict[str, tf.Tensor]]]:
    """The root object of the TF2 SavedModel, traced, and its serving function."""
    variables = {
        name: tf.Variable(value, trainable=is_trainable(name), name=name)
        for name, value in values.items()
    }
    images = tf.TensorSpec(image_shape(spec), tf.float32, "images")
    momentum = tf.TensorSpec([], tf.float32, "batch_norm_momentum")

    @tf.function(autograph=False)  # the network is built once for each of its two modes
    def run(
        images: tf.Tensor, training: bool, batch_norm_momentum: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        network = build(
            spec, head, lambda name, _: variables[name], images, training, batch_norm_momentum
        )
        for variable, value in network.updates:
            variable.assign(value)
        return {"default": network.end_points[default_end_point(head)], **network.end_points}

    @tf.function(autograph=False)
    def call(
        images: tf.Tensor,
        training: bool = False,
        return_endpoints: bool = False,
        batch_norm_momentum: float | tf.Tensor = BATCH_NORM_MOMENTUM,
    ) -> tf.Tensor | dict[str, tf.Tensor]:
        outputs = run(images, training, tf.convert_to_tensor(batch_norm_momentum))
        return outputs if return_endpoints else outputs["default"]

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(images.shape, name="inputs")])
    def serve(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"default": run(inputs, False, tf.constant(BATCH_NORM_MOMENTUM))["default"]}

    def regularization(kernel: tf.Variable) -> Callable[[], tf.Tensor]:
        return tf.function(lambda: l2_loss(spec, kernel), autograph=False, input_signature=[])

    for training in (False, True):
        for return_endpoints in (False, True):
            call.get_concrete_function(images, training, return_endpoints, momentum)
    model = tf.train.Checkpoint()
    model.__call__ = call
    model.variables = list(variables.values())
    model.trainable_variables = [variables[name] for name in variables if is_trainable(name)]
    model.regularization_losses = [
        regularization(variables[name]) for name in variables if is_kernel(name)
    ]
    return model, serve


def _meta_graph(spec: NetworkSpec, head: Head, training: bool) -> meta_graph_pb2.MetaGraphDef:
    """One graph variant of the hub.Module: its graph, signatures, collections and tags."""
    with tf.Graph().as_default() as graph:
        images = v1.placeholder(tf.float32, image_shape(spec), "hub_input/images")
        momentum = v1.placeholder_with_default(
            tf.constant(BATCH_NORM_MOMENTUM), [], "batch_norm_momentum"
        )
        network = build(spec, head, _graph_variable, images, training, momentum)
        for variable, value in network.updates:
            v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, variable.assign(value, read_value=False))
        for variable in v1.trainable_variables():
            if is_kernel(variable.op.name):
                v1.add_to_collection(v1.GraphKeys.REGULARIZATION_LOSSES, l2_loss(spec, variable))
        meta_graph = v1.train.export_meta_graph(graph=graph, strip_default_attrs=True)

    if training:
        meta_graph.meta_info_def.tags.append("train")
    plain = {"images": images}
    tuned = {**plain, "batch_norm_momentum": momentum}
    tasks = {"image_feature_vector": network.end_points["global_pool"]}
    if head == "classification":
        tasks["image_classification"] = network.end_points["Logits"]
    signatures = {"default": (plain, {"default": network.end_points[default_end_point(head)]})}
    for task, default in tasks.items():
        outputs = {"default": default, **network.end_points}
        signatures[task] = (plain, outputs)
        signatures[f"{task}_with_bn_hparams"] = (tuned, outputs)
    for name, (inputs, outputs) in signatures.items():
        meta_graph.signature_def[name].CopyFrom(
            meta_graph_pb2.SignatureDef(inputs=_infos(inputs), outputs=_infos(outputs))
        )
    meta_graph.collection_def["hub_module_attachments"].bytes_list.value.append(
        _image_module_info(spec.image_size)
    )
    return meta_graph


def _graph_variable(name: str, shape: tuple[int, ...]) -> tf.Variable:
    return v1.get_variable(
        name,
        shape,
        initializer=v1.zeros_initializer(),
        trainable=is_trainable(name),
        use_resource=True,
    )


def _infos(tensors: dict[str, tf.Tensor]) -> dict[str, meta_graph_pb2.TensorInfo]:
    return {
        name: meta_graph_pb2.TensorInfo(
            name=tensor.name,
            dtype=tensor.dtype.as_datatype_enum,
            tensor_shape=tensor.shape.as_proto(),
        )
        for name, tensor in tensors.items()
    }


def _image_module_info(size: int) -> bytes:
    """The ModuleAttachment that tells hub.Module the image size.

    tensorflow_hub no longer ships these messages: ModuleAttachment{key = 1, value = 2},
    ImageModuleInfo{default_image_size = 1}, InputSize{height = 1, width = 2}.
    """
    info = _field(1, _field(1, size) + _field(2, size))
    return _field(1, b"image_module_info") + _field(2, info)


def _field(number: int, value: int | bytes) -> bytes:
    """A protocol buffer's field: a varint for an int, length-delimited for bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])
