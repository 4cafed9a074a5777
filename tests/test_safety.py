"""Models that reach files or the network are refused before anything of them runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import exports
import pytest
import tensorflow as tf
from pictures import jpeg
from tensorflow.core.framework import op_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.client import pywrap_tf_session
from tensorflow.python.trackable import resource

from models.freezing import read_proto
from models.safety import unsafe_ops, unsafe_types
from pipeline import models

SIZE = 6


class Network(tf.Module):
    """A harmless model, with `also` done beside the work, and a variable, so that it has savers."""

    def __init__(self, also=lambda: None):
        super().__init__()
        self.head = tf.Variable(tf.ones([3, 5]))
        self.also = also

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3])], autograph=False)
    def serve(self, x):
        self.also()
        return {"y": tf.reduce_mean(x * 2.0 - 1.0, [1, 2]) @ self.head}


class AtLoading(resource.CapturableResource):
    """Something like a lookup table, which `also` initialises whenever the model is loaded."""

    def __init__(self, also):
        super().__init__()
        self.also = also

    def _create_resource(self):
        return tf.constant(0.0)

    @tf.function(input_signature=[], autograph=False)
    def _initialize(self):
        self.also()
        return 1


def saved(directory: Path, module: Network) -> str:
    tf.saved_model.save(module, str(directory), {"serving_default": module.serve})
    return str(directory)


def writes(path: Path):
    return lambda: tf.io.write_file(str(path), "written by the model")


def save_checkpoint(path: Path):
    return lambda: tf.raw_ops.SaveV2(
        prefix=str(path), tensor_names=["x"], shape_and_slices=[""], tensors=[tf.constant(1.0)]
    )


def restores_checkpoint(path: Path):
    return lambda: tf.raw_ops.RestoreV2(
        prefix=str(path), tensor_names=["x"], shape_and_slices=[""], dtypes=[tf.float32]
    )


def calls_python(path: Path):
    return lambda: tf.py_function(lambda: path.write_text("written by the model"), [], [])


def prints(path: Path):
    return lambda: tf.print("pixels", output_stream=f"file://{path}")


def in_a_branch(path: Path):
    """In the body of a loop, which is a function of its own."""

    def also():
        tf.while_loop(
            lambda i: i < 1,
            lambda i: (tf.io.write_file(str(path), "written by the model"), i + 1)[1:],
            [tf.constant(0)],
        )

    return also


def at_loading(also):
    """The model whose table does `also` when it is loaded."""
    module = Network()
    module.table = AtLoading(also)
    return module


HARMFUL = {
    "WriteFile": lambda path: Network(writes(path)),
    "WriteFile in a loop": lambda path: Network(in_a_branch(path)),
    "SaveV2": lambda path: Network(save_checkpoint(path)),
    "RestoreV2": lambda path: Network(restores_checkpoint(path)),
    "PrintV2": lambda path: Network(prints(path)),
    "EagerPyFunc": lambda path: Network(calls_python(path)),
    "WriteFile at loading": lambda path: at_loading(writes(path)),
    "SaveV2 at loading": lambda path: at_loading(save_checkpoint(path)),
}


@pytest.fixture(params=HARMFUL)
def harmful(request, tmp_path):
    """A model directory, its operation, and the folder into which it writes."""
    (tmp_path / "loot").mkdir()
    module = HARMFUL[request.param](tmp_path / "loot" / "file")
    directory = saved(tmp_path / "model", module)
    shutil.rmtree(tmp_path / "loot")  # saving ran the initialiser
    (tmp_path / "loot").mkdir()
    return directory, request.param.split()[0], tmp_path / "loot"


@pytest.fixture
def told(capsys):
    """Runs a model command; gives its code, what it printed, and its one line of error."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = models.main(argv)
        out, err = capsys.readouterr()
        assert err.count("\n") <= 1, err
        assert err.startswith("error: ") == (code != 0), err
        return code, out, err

    return call


def test_a_harmful_model_is_refused_before_it_is_loaded(harmful, told, job, tmp_path):
    directory, operation, loot = harmful
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())

    ran = job(tmp_path / "in", model=directory)
    assert ran.code == 2
    assert operation in ran.stderr
    assert "--allow_unsafe_ops" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()

    code, _, error = told("prepare", directory, "--output", str(tmp_path / "prepared"))
    assert code == 2
    assert operation in error
    assert not (tmp_path / "prepared").exists()

    code, out, _ = told("inspect", directory)
    assert code == 0
    assert operation in json.loads(out)["unsafe_ops"]
    assert json.loads(out)["outputs"] is None
    assert list(loot.iterdir()) == []


@pytest.mark.parametrize("name", ["WriteFile", "WriteFile at loading"])
def test_a_harmful_model_runs_where_that_is_allowed(name, told, job, tmp_path):
    """And it does what it was refused for, so that the test above can fail."""
    loot = tmp_path / "loot"
    directory = saved(tmp_path / "model", HARMFUL[name](loot))
    loot.unlink(missing_ok=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    ran = job(tmp_path / "in", model=directory, allow_unsafe_ops=True)
    assert ran.code == 0
    assert ran.line["features"] == 1
    assert loot.exists()

    code, out, _ = told("inspect", directory, "--allow_unsafe_ops")
    assert code == 0
    assert json.loads(out)["outputs"] == {"embedding": 3, "logits": 5}
    assert json.loads(out)["unsafe_ops"] == ["WriteFile"]


def test_a_harmful_graph_that_claims_to_be_prepared(told, job, tmp_path):
    """What was prepared with leave asks for leave again, in a loop's body too."""

    def run(x):
        def body(i, total):
            with tf.control_dependencies([tf.io.write_file(str(tmp_path / "loot"), "loot")]):
                return i + 1, total + tf.reduce_mean(x * 2.0 - 1.0, [1, 2])

        _, total = tf.while_loop(lambda i, _: i < 3, body, [0, tf.zeros([tf.shape(x)[0], 3])])
        return {"embedding": tf.reshape(total, [-1, 3])}

    module = tf.Module()
    module.serve = tf.function(run, input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3])])
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": module.serve})
    prepared = str(tmp_path / "prepared")
    flags = ["--value_range", "0,1", "--output", prepared]
    assert told("prepare", str(tmp_path / "m"), *flags)[0] == 2
    assert told("prepare", str(tmp_path / "m"), *flags, "--allow_unsafe_ops")[0] == 0
    assert json.loads(told("inspect", prepared)[1])["unsafe_ops"] == ["WriteFile"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg())
    ran = job(tmp_path / "in", model=prepared)
    assert ran.code == 2
    assert "WriteFile" in ran.stderr
    assert not (tmp_path / "loot").exists()
    assert job(tmp_path / "in", model=prepared, allow_unsafe_ops=True).code == 0
    assert (tmp_path / "loot").exists()


def test_functions_of_a_frozen_graph_are_looked_into():
    graph = tf.compat.v1.GraphDef()
    graph.library.function.add().node_def.add(op="WriteFile", name="loot")
    assert unsafe_types(graph) == ["WriteFile"]


@pytest.mark.parametrize("head", ["classification", "feature_vector"])
@pytest.mark.parametrize("format", ["saved_model", "hub_v1"])
def test_what_we_export_is_clean(format, head, told):
    directory = exports.exported(format, head)
    assert unsafe_ops(read_proto(directory)) == []
    code, out, _ = told("inspect", directory)
    assert (code, json.loads(out)["unsafe_ops"]) == (0, [])


def test_a_model_of_keras_is_clean(tmp_path):
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input([SIZE, SIZE, 3]),
            layers.Rescaling(1 / 127.5, -1.0),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.5),
            layers.Dense(5, activation="softmax"),
        ]
    )
    model.export(str(tmp_path / "m"), verbose=False)
    assert unsafe_ops(read_proto(str(tmp_path / "m"))) == []


# --- a saver's own operations ------------------------------------------------------------------


def tf1_graph(build, saver: bool = True) -> saved_model_pb2.SavedModel:
    """A TF1 SavedModel with one variable; `build` may add to it and gives an initialiser's name."""
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        images = v1.placeholder(tf.float32, [None, SIZE, SIZE, 3])
        head = v1.get_variable("head", [3, 5], use_resource=True)
        output = tf.reduce_mean(images, [1, 2]) @ head
        saving = v1.train.Saver() if saver else None
        v1.train.Saver(name="left_over")
        initializer = build(output)
        meta = v1.train.export_meta_graph(
            graph=graph, saver_def=saving.saver_def if saving else None
        )
    signature = meta_graph_pb2.SignatureDef()
    signature.outputs["y"].name = output.name
    meta.signature_def["serving_default"].CopyFrom(signature)
    if initializer:
        meta.collection_def["saved_model_main_op"].node_list.value.append(initializer)
    return saved_model_pb2.SavedModel(meta_graphs=[meta])


def test_a_tf1_models_savers_are_clean():
    assert unsafe_ops(tf1_graph(lambda output: None)) == []
    assert unsafe_ops(tf1_graph(lambda output: None, saver=False)) == []


def test_a_saver_that_an_initialiser_runs():
    def build(output):
        return save_checkpoint(Path("/loot"))().name

    assert unsafe_ops(tf1_graph(build)) == ["SaveV2"]


def test_a_saver_that_restoring_runs():
    def build(output):
        graph = tf.compat.v1.get_default_graph()
        graph.get_operation_by_name("save/restore_all")._add_control_input(
            save_checkpoint(Path("/loot"))()
        )

    assert unsafe_ops(tf1_graph(build)) == ["SaveV2"]


def test_a_saver_that_a_variables_initialiser_runs():
    def build(output):
        graph = tf.compat.v1.get_default_graph()
        graph.get_operation_by_name("head/Assign")._add_control_input(
            save_checkpoint(Path("/loot"))()
        )

    assert unsafe_ops(tf1_graph(build)) == ["SaveV2"]


@pytest.mark.parametrize("where", ["concrete_functions", "bare", "captured"])
def test_a_savers_function_among_the_models_own(where):
    """A model whose message was changed so that an object's method is the saver's."""
    proto = read_proto(exports.exported("saved_model", "feature_vector"))
    (meta,) = proto.meta_graphs
    (name,) = (
        function.signature.name
        for function in meta.graph_def.library.function
        if any(node.op == "SaveV2" for node in function.node_def)
    )
    objects = meta.object_graph_def
    if where == "concrete_functions":
        objects.concrete_functions[name].SetInParent()
    elif where == "bare":
        objects.nodes.add().bare_concrete_function.concrete_function_name = name
    else:
        objects.nodes.add().captured_tensor.concrete_function = name
    assert "SaveV2" in unsafe_ops(proto)


# --- every operation that TensorFlow has -------------------------------------------------------

# Reviewed for TensorFlow 2.21: what reads, writes, lists or connects, or runs what a string holds.
REACHING = """
ReadFile WriteFile MatchingFiles MatchingFilesDataset ExperimentalMatchingFilesDataset
WholeFileReader WholeFileReaderV2 TextLineReader TextLineReaderV2 FixedLengthRecordReader
FixedLengthRecordReaderV2 TFRecordReader TFRecordReaderV2 LMDBReader IdentityReader
IdentityReaderV2 RecordInput TFRecordDataset TFRecordDatasetV2 TextLineDataset
FixedLengthRecordDataset FixedLengthRecordDatasetV2 CSVDataset CSVDatasetV2 ExperimentalCSVDataset
LMDBDataset ExperimentalLMDBDataset SqlDataset ExperimentalSqlDataset CacheDataset CacheDatasetV2
SnapshotDataset SnapshotDatasetV2 SnapshotDatasetReader SnapshotNestedDatasetReader
SnapshotChunkDataset ListSnapshotChunksDataset SaveDataset SaveDatasetV2 LoadDataset DistributedSave
DatasetToTFRecord ExperimentalDatasetToTFRecord DatasetFromGraph RegisterDataset RegisterDatasetV2
DataServiceDataset DataServiceDatasetV2 DataServiceDatasetV3 DataServiceDatasetV4
InitializeTableFromTextFile InitializeTableFromTextFileV2 GenerateVocabRemapping LoadAndRemapMatrix
Skipgram FixedUnigramCandidateSampler DecodeProtoV2 EncodeProto Save SaveSlices Restore RestoreSlice
DTensorRestoreV2 PrintV2 DumpTensor DebugIdentity DebugIdentityV2 DebugIdentityV3 DebugNanCount
DebugNumericSummary DebugNumericSummaryV2 Copy CopyHost CreateSummaryDbWriter
CreateSummaryFileWriter ImportEvent WriteSummary WriteScalarSummary WriteHistogramSummary
WriteImageSummary WriteAudioSummary WriteGraphSummary WriteRawProtoSummary PyFunc PyFuncStateless
EagerPyFunc RpcClient RpcCall RpcServer RpcServerStart RpcServerRegister RemoteCall Send Recv _Send
_Recv _HostSend _HostRecv FileSystemSetConfiguration
"""
# What a name makes one think of, and which reaches nothing.
HARMLESS = """
AudioSummary AudioSummaryV2 BarrierReadySize DecodeCSV GraphDefVersion HistogramSummary ImageSummary
IteratorGetModelProto MergeSummary RequiresOlderGraphVersion ScalarSummary Snapshot TensorArrayRead
TensorArrayReadV2 TensorArrayWrite TensorArrayWriteV2 TensorSummary TensorSummaryV2
TpuHandleToProtoKey
ReadVariableOp _ReadVariablesOp RngReadAndSkip ReadVariableXlaSplitND TensorArrayReadV3
TensorArrayWriteV3 ReaderReset ReaderResetV2 ReaderSerializeState ReaderSerializeStateV2
ReaderNumRecordsProduced ReaderNumRecordsProducedV2 ReaderNumWorkUnitsCompleted
ReaderNumWorkUnitsCompletedV2 Print DatasetToGraph DatasetToGraphV2 Fingerprint DatasetFingerprint
DeepCopy CopyOp
"""
SUSPECT = re.compile(
    r"(File|Read|Write|Load|Save|Restore|Record|Rpc|Remote|Service|PyFunc|Print|Dump|Debug|Summary"
    r"|Snapshot|Sql|LMDB|CSV|Vocab|Copy|Graph|Fingerprint|Proto)"
)
NOT_ON_CPU = re.compile(r"TPU|Xla|Mesh|BoostedTrees|_Copy|Stats|Calibration|DisableCopy|Gradient")


def registered() -> set[str]:
    ops = op_def_pb2.OpList()
    ops.ParseFromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList()))
    return {op.name for op in ops.op}


def caught(names) -> set[str]:
    graph = tf.compat.v1.GraphDef()
    for name in names:
        graph.node.add(op=name, name=name)
    return set(unsafe_types(graph))


def test_every_reviewed_operation_is_caught():
    assert set(REACHING.split()) - registered() == set(), "TensorFlow has renamed some"
    assert set(REACHING.split()) - caught(REACHING.split()) == set()


def test_operations_of_ordinary_graphs_are_not_caught():
    used = set(HARMLESS.split())
    for format in ("saved_model", "hub_v1"):
        for meta in read_proto(exports.exported(format, "classification")).meta_graphs:
            used |= {node.op for node in meta.graph_def.node}
            for function in meta.graph_def.library.function:
                used |= {node.op for node in function.node_def}
    savers = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
    assert used >= {"Conv2D", "FusedBatchNormV3", "MatMul", "Softmax", *savers}
    common = {name for name in dir(tf.raw_ops) if name.startswith(("Conv", "Max", "Rand", "Res"))}
    common -= {"Restore", "RestoreSlice", "RestoreV2"}
    assert caught((used | common) - savers) == set()


def test_a_new_operation_with_a_suspect_name_is_reviewed():
    """After a new TensorFlow: put what this names into one of the two lists."""
    suspect = {
        name for name in registered() if SUSPECT.search(name) and not NOT_ON_CPU.search(name)
    }
    assert suspect - caught(suspect) - set(HARMLESS.split()) == set()
