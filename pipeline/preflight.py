"""Everything that is checked and decided before any work: options -> the plan of the graph."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from formats import dataset, example, inputs, resampling, resuming
from formats.dataset import Publication
from formats.image import Preprocessing
from formats.isolation import Limits, shared_processes, start_ahead
from formats.manifest import replaceable_manifest
from formats.records import DecodedImage, Features, ImageRecord, utf8
from formats.table import TableSpec, metadata_text
from models import handles, prepared
from pipeline import __version__, dataflow, portable
from pipeline.options import Options
from storage import files, imports, reach, temporaries
from storage.errors import RequestError
from storage.secrets import hide

if TYPE_CHECKING:
    from models.loading import LoadSpec, ModelInfo
    from pipeline.graph import Plan

VERSIONED = ("apache-beam", "tensorflow", "pillow", "pyarrow", "numpy")
DIRECT_RUNNER = "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner"
_SAMPLE = 64  # examples that are looked at for the types of label and columns
_BYTES_PER_PIXEL = 24  # of the memory to decode in
_LEAST_MEMORY = 64 << 20  # what even a small picture's decoder, and its encoded bytes, may take
_TRIES = 10  # images that a dry run looks at for one that can be used

log = logging.getLogger("pipeline")


def make_plan(options: Options, beam_args: Sequence[str], run_id: str, started: float) -> Plan:
    """All decisions of a run, cheap checks first. Raises RequestError; leaves no trace."""
    writes = options.sink != "null"
    output = files.absolute(options.output) if writes else ""
    warnings: list[str] = []  # told when nothing stands in the way: what does has a line of its own
    _check_tried_again(options, output)
    workers = _reach_stores(options, beam_args, output, warnings)
    before = _check_output(output, options.if_exists, warnings) if writes else None
    names = _class_names(options.class_names)
    directory = handles.resolve(options.model, options.model_sha256)
    sources, doubts = inputs.survey(
        options.input, options.input_format, options.allow_empty, output
    )
    warnings += doubts
    there = None  # the schema of rows beside which the run's will stand
    if options.if_exists == "resume":
        there = resuming.features_schema(output, before)
    keys = example.ExampleKeys(
        options.image_key, options.id_key, options.label_key or None, _as_in(there, options.columns)
    )
    types = _types(sources, keys, there, warnings)
    if writes:
        reach.soon(output, lambda: files.check_writable(output))

    isolation = _isolation(options)
    if isolation and runs_here(beam_args):
        start_ahead(isolation)  # it imports while TensorFlow does
    if handles.model_format(directory) == handles.PREPARED:
        prepared.read_ahead(directory)

    with imports.uncollected():
        from models.loading import default_batch_size, has_gpu
        from pipeline.graph import Plan
        from transforms.sources import Finished, Reading

    on_gpu = workers.gpu if workers else has_gpu(options.engine)
    elsewhere = bool(workers or (beam_args and portable.goes_on(beam_args)))
    spec, info = _load(options, workers, elsewhere, on_gpu, warnings)
    _check_classes(options, info, names)
    preprocessing = Preprocessing(
        info.image_size,
        options.fit,
        options.filter,
        options.jpeg_scaling,
        options.formats,
        options.max_image_pixels,
    )
    written = {
        name: info.outputs[name] for name in _as_in(there, options.outputs or tuple(info.outputs))
    }
    provenance = _provenance(options, info, preprocessing, written)
    rows = _deciding(options, provenance, names, types)
    metadata = metadata_text({**provenance, "run_id": run_id, resuming.ROW_META: rows})
    table = _table(options, written, names, types, metadata)
    resumed = resuming.Resumed()
    if options.if_exists == "resume":
        retry: Iterable[str] | None = None
        if options.retry_failures:  # a limit may end the run anywhere in a file
            retry = () if options.limit else inputs.read_whole(sources, output)
        resumed = resuming.resume(output, before, rows, retry)
    finished = None
    if resumed.finished and not options.dry_run:
        finished = files.join(output, dataset.finished_name(run_id))
        Finished.write(finished, resumed.finished)
        if not files.is_remote(finished) and runs_here(beam_args):
            temporaries.track(finished)  # an interrupted run takes it along
    if resampling.WHY_NOT and options.filter == "antialias" and runs_here(beam_args):
        log.info("%s", resampling.WHY_NOT)
    for warning in warnings:
        log.warning("%s", utf8(hide(warning)))  # not all that takes logs can take other text
    return Plan(
        sources=tuple(sources),
        reading=Reading(
            keys=keys,
            types=types,
            max_image_bytes=options.max_image_bytes,
            on_damage=options.on_damage,
            allow_http=options.allow_http,
            counts={**resumed.counts, **inputs.known_counts(sources)},
        ),
        limit=options.limit,
        finished=finished,
        preprocessing=preprocessing,
        isolation=isolation,
        model=spec,
        fingerprint=info.fingerprint,
        value_range=info.value_range,
        batch_size=options.batch_size
        or default_batch_size(info.image_size, options.precision, on_gpu),
        table=table,
        rows_per_file=options.rows_per_file,
        metadata=metadata,
        publication=Publication(
            output=output,
            run_id=run_id,
            if_exists=options.if_exists,
            replaces=before["run_id"] if before else None,
            max_failure_rate=options.max_failure_rate,
            compression=options.compression,
            described={
                "options": options.described(),
                "model": {
                    "handle": provenance["model_handle"],
                    "format": info.format,
                    "fingerprint": info.fingerprint,
                    "image_size": info.image_size,
                    "outputs": dict(info.outputs),
                },
                "preprocessing": provenance["preprocessing"],
                "versions": provenance["versions"],
                "warnings": [hide(warning) for warning in warnings],
            },
            kept=resumed.kept,
            retried=resumed.retried,
            reread=resumed.reread,
            # The launcher may have left by then, and with it whoever else would remove this.
            retired=(
                *resumed.retired,
                *([os.path.basename(finished)] if finished and workers else []),
            ),
        ),
        started=started,
        sink=options.sink,
        stop_after=options.stop_after,
        accelerator=dataflow.accelerator(options.gpu),
    )


def _check_tried_again(options: Options, output: str) -> None:
    if (options.input_format, options.if_exists) != ("failures", "overwrite"):
        return
    tried_again = {os.path.realpath(files.absolute(path)) for path in options.input}
    if os.path.realpath(output) in tried_again:
        raise RequestError(
            f"--if_exists overwrite: would leave of {output} nothing but what failed there and "
            "is tried again; give --if_exists resume --retry_failures, which keeps the rest, "
            "or another --output"
        )


def _reach_stores(
    options: Options, beam_args: Sequence[str], output: str, warnings: list[str]
) -> dataflow.Workers | None:
    """Hold Beam's flags against `options`, and see that every store answers that the run needs.

    What is known of the workers of Dataflow, None where others run the steps.
    """
    stored = [*options.input, *filter(None, [output, options.class_names])]
    if not handles.archive_url(options.model):
        stored.append(options.model)
    stored = list(map(files.absolute, stored))
    if any(map(files.is_remote, stored)) or beam_args:
        _check_beam_flags(options, beam_args, warnings)
        files.configure_stores(beam_args)
    workers = None
    if beam_args and dataflow.is_dataflow(beam_args):
        workers = dataflow.workers(options, beam_args)
        if dataflow.unbounded(beam_args):
            warnings.append("--max_num_workers is not given: the service's own bound is thousands")
        if not dataflow.sends_code(beam_args):
            warnings.append(
                "--runner DataflowRunner: this is no checkout, so workers are not sent this code: "
                "their image must hold it, or give --setup_file or --extra_package"
            )
        if options.engine == "openvino":
            warnings.append(
                "--engine openvino: every worker needs it, or all bundles fail; the image must "
                "have been built with --build-arg LOCK=openvino (deploy/README.md)"
            )
    elif options.gpu:
        raise RequestError(
            f"--gpu {options.gpu}: asks Dataflow for one, and only it; other runners use the GPU "
            "that their workers have; leave it out"
        )
    stores = {"/".join(path.split("/")[:3]): path for path in stored if files.is_remote(path)}
    for path in stores.values():
        reach.check(path)
    return workers


def _load(
    options: Options,
    workers: dataflow.Workers | None,
    elsewhere: bool,
    on_gpu: bool,
    warnings: list[str],
) -> tuple[LoadSpec, ModelInfo]:
    """What each worker will load, and what is known of it since it was loaded here."""
    from models.loading import (
        BFLOAT16,
        GPU_UNSEEN,
        Hints,
        LoadSpec,
        ModelError,
        default_copies,
        load,
    )

    handle = options.model
    spec = LoadSpec(
        handle=handle if handles.archive_url(handle) else files.absolute(handle),
        outputs=options.outputs,
        sha256=options.model_sha256,
        hints=Hints(options.image_size, options.value_range),
        allow_unsafe_ops=options.allow_unsafe_ops,
        precision=options.precision,
        copies=options.inference_threads or _copies(workers) or default_copies(on_gpu),
        engine=options.engine,
    )
    if elsewhere and not workers and options.inference_threads is None:
        warnings.append(
            "--inference_threads is not given: workers elsewhere run as many batches at once as "
            "suits this machine; give the cores of one of them"
        )
    if GPU_UNSEEN and not elsewhere and options.engine == "tensorflow":
        warnings.append(
            "TensorFlow does not see this machine's NVIDIA GPU, so that the CPU computes: "
            "./setup_venv.sh requirements/gpu.txt adds CUDA's libraries; CUDA_VISIBLE_DEVICES=-1 "
            "says that it is meant so"
        )
    if options.precision == "bfloat16" and not on_gpu and (elsewhere or not BFLOAT16):
        where = "CPUs of the workers that have" if elsewhere else "this CPU has"
        warnings.append(
            f"--precision bfloat16: {where} neither AMX nor AMD's AVX-512 BF16, by which it is "
            f"faster, {'compute' if elsewhere else 'so the layers stay'} in float32"
        )
    if options.top_k and options.outputs:
        spec = dataclasses.replace(spec, outputs=tuple(sorted({*options.outputs, "logits"})))
    try:
        # What another machine will run is only looked at here.
        return spec, load(dataclasses.replace(spec, copies=1) if workers else spec).info
    except ModelError:
        if spec.outputs == tuple(sorted(options.outputs)):
            raise
        # Without logits `_check_classes` has the better words.
        return spec, load(dataclasses.replace(spec, outputs=options.outputs, copies=1)).info


def _provenance(
    options: Options, info: ModelInfo, preprocessing: Preprocessing, written: Mapping[str, int]
) -> dict[str, Any]:
    """What every file of the run tells of how it was made, besides the run."""
    versioned = (*VERSIONED, *([options.engine] if options.engine not in VERSIONED else []))
    versions = {name: importlib.metadata.version(name) for name in versioned}
    versions["image-features"] = __version__  # a Flex Template's launcher installs no project
    return {
        "model_handle": hide(options.model),
        "model_fingerprint": info.fingerprint,
        "preprocessing": {**preprocessing.describe(), "value_range": list(info.value_range)},
        "vectors": {
            name: {"dtype": options.embedding_dtype, "width": width}
            for name, width in written.items()
        },
        "precision": options.precision,
        "engine": options.engine,
        "versions": versions,
    }


def _deciding(
    options: Options,
    provenance: Mapping[str, Any],
    names: Sequence[str],
    types: example.ExampleTypes,
) -> dict[str, Any]:
    """All that decides what a row holds: rows stand beside each other only where this is the same.

    See `formats.resuming`.
    """
    return {
        "model": provenance["model_fingerprint"],
        **{name: provenance[name] for name in ("preprocessing", "precision", "engine", "vectors")},
        "vector_type": options.vector_type,
        "top_k": options.top_k,
        "class_names": list(names),
        "keys": [options.image_key, options.id_key, options.label_key],
        "label": str(types.label),
        "columns": {name: str(kind) for name, kind in types.columns.items()},
    }


def _table(
    options: Options,
    written: Mapping[str, int],
    names: tuple[str, ...],
    types: example.ExampleTypes,
    metadata: Mapping[str, str],
) -> TableSpec:
    table = TableSpec(
        widths=written,
        dtype=options.embedding_dtype,
        vector_type=options.vector_type,
        top_k=options.top_k,
        class_names=names,
        label=types.label,
        columns=types.columns,
        metadata=metadata,
    )
    try:
        table.schema()
    except ValueError as error:
        raise RequestError(f"--columns: {error}") from None
    return table


def _isolation(options: Options) -> Limits | None:
    if options.decode_isolation == "none":
        return None
    largest = max(_BYTES_PER_PIXEL * options.max_image_pixels, _LEAST_MEMORY)
    return Limits(options.decode_seconds, options.decode_memory or largest)


def _copies(workers: dataflow.Workers | None) -> int | None:
    """Batches at once on the CPUs of another machine's workers; None where it is this one, or a
    GPU computes.
    """
    return workers.cores if workers and not workers.gpu else None


def runs_here(beam_args: Sequence[str]) -> bool:
    """Whether the steps run in this process, as far as `--runner` tells."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--runner")
    return runner_of(given.parse_known_args(list(beam_args))[0].runner) == DIRECT_RUNNER


def runner_of(name: str | None) -> str:
    """The runner that `name` means. DirectRunner is Beam's FnApiRunner, whatever the spelling.

    Beam's own switching would first try Prism, whose binary it downloads.
    """
    bare = (name or "direct").rpartition(".")[2].lower().removesuffix("runner")
    return DIRECT_RUNNER if bare in ("direct", "switchingdirect") else str(name)


def _check_beam_flags(options: Options, beam_args: Sequence[str], warnings: list[str]) -> None:
    """Raise RequestError for values that Beam refuses, which it would tell in many lines, late, and
    for what its runners cannot do with `options`; flags alone tell, and whether a job server is
    there.
    """
    from apache_beam.options.pipeline_options import StandardOptions
    from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
    from apache_beam.runners.runner import create_runner

    given = files.beam_options(beam_args)
    if dataflow.is_dataflow(beam_args):
        dataflow.check(options, beam_args)
    standard = given.view_as(StandardOptions)
    standard.runner = runner_of(standard.runner)
    try:
        with dataflow.uncalled():
            problems = PipelineOptionsValidator(given, create_runner(standard.runner)).validate()
    except Exception as error:  # whatever a runner's lookup raises, the name is what was wrong
        raise RequestError(f"--runner {standard.runner}: {error}") from None
    if problems:
        raise RequestError(problems[0])
    if standard.no_wait_until_finish and not (
        dataflow.is_dataflow(beam_args) or portable.goes_on(beam_args)
    ):
        raise RequestError(
            "--no_wait_until_finish: the job would end with this command, undone; it is for "
            "Dataflow, and for a --job_endpoint with workers of its own; leave it out"
        )
    portable.check(beam_args)
    if standard.runner == DIRECT_RUNNER and (unread := portable.of_other_runners(beam_args)):
        line = (
            f"{', '.join(unread)}: nothing reads it, since DirectRunner runs everything in this "
            "process"
        )
        if "--runner" not in portable.names(beam_args):
            raise RequestError(f"{line}; give the --runner that it is for, or leave it out")
        warnings.append(line)


def _check_output(output: str, if_exists: str, warnings: list[str]) -> dict[str, Any] | None:
    try:
        if files.is_file(output.rstrip("/")):  # `out/` may be what a console's folder leaves
            raise RequestError(f"--output {output}: is a file; give a folder, or a name for one")
        refused = if_exists == "error" and files.occupied(output)
        if refused:
            raise RequestError(
                f"--output {output}: something is there already, which a second run would mix "
                "with; give another folder, --if_exists resume or --if_exists overwrite"
            )
        before = replaceable_manifest(output, if_exists)
        if before is None and files.is_file(files.join(output, "manifest.json")):
            warnings.append(
                f"{output}: its manifest cannot be read and will be replaced; data files that it "
                "named are not known any more and stay until a resumed run or a person removes them"
            )
        return before
    except OSError as error:
        raise RequestError(f"--output: {error}") from None


def _class_names(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return tuple(files.read_bytes(files.absolute(path)).decode("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--class_names {path}: cannot be read ({error})") from None


def _as_in(schema: pa.Schema | None, names: Sequence[str]) -> tuple[str, ...]:
    """`names` in the order that they have in `schema`: all files of an output have one."""
    known = schema.names if schema else []
    return tuple(sorted(names, key=lambda name: known.index(name) if name in known else len(known)))


def _plain(kind: pa.DataType) -> pa.DataType:
    """A column's type as `infer_types` gives it: Parquet names the elements of a list anew."""
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def _types(
    sources: Sequence[inputs.Source],
    keys: example.ExampleKeys,
    there: pa.Schema | None,
    warnings: list[str],
) -> example.ExampleTypes:
    known = None
    if there:
        columns = {
            name: _plain(there.field(name).type) for name in keys.columns if name in there.names
        }
        known = example.ExampleTypes(there.field("label").type, columns)
    labelled = keys.label not in (None, example.ExampleKeys().label)
    imaged = keys.image != example.ExampleKeys().image
    asked = bool(keys.columns or keys.id or labelled or imaged)
    try:
        types = inputs.infer_types(sources, keys, _SAMPLE, known)
        unseen = inputs.unseen(sources, keys, _SAMPLE)
        pictures = types is None and asked and inputs.any_picture(sources)
        without = list(inputs.without_image(sources, keys, _SAMPLE))
    except ValueError as error:
        raise RequestError(str(error)) from None
    except OSError as error:
        raise RequestError(f"--input: cannot be read ({error})") from None
    for pattern, looked_at, instead in without:
        warnings.append(
            f"--image_key {keys.image}: none of the first {looked_at} records of {pattern} has it "
            f"({instead}); each such record fails; give the name of what holds the picture"
        )
    if pictures and keys.columns:
        raise RequestError(
            f"--columns {','.join(keys.columns)}: image files have no features to carry"
        )
    if pictures and keys.id:
        warnings.append(f"--id_key {keys.id}: image files have no features; keys are their paths")
    if pictures and imaged:
        warnings.append(f"--image_key {keys.image}: image files have no features")
    if pictures and labelled:
        warnings.append(f"--label_key {keys.label}: image files have no features, and so no label")
    for name in unseen:
        flag, then = ("id", "keys are URI#index") if name == keys.id else ("label", "it is null")
        warnings.append(f"--{flag}_key {name}: none of the first images has it; {then} then")
    return types or known or example.ExampleTypes(pa.int64(), {})


def _check_classes(options: Options, info: ModelInfo, names: Sequence[str]) -> None:
    if not options.top_k:
        return
    width = info.outputs.get("logits")
    if width is None:
        raise RequestError(
            f"--top_k {options.top_k}: needs logits, and the model has only "
            f"{', '.join(info.outputs)}; give a classification model"
        )
    if options.top_k > width:
        raise RequestError(f"--top_k {options.top_k}: the model has only {width} classes")
    if names and len(names) != width:
        raise RequestError(
            f"--class_names {options.class_names}: {len(names)} lines for {width} classes; every "
            "name could stand at a wrong class; give one line for each logit"
        )


def try_one_image(plan: Plan) -> None:
    """Read, decode and run the first image that can be; RequestError where none of a few can."""
    from models.loading import load
    from transforms.decode import decode_record
    from transforms.inference import infer_batch
    from transforms.sources import READERS

    reasons = []
    with shared_processes(plan.preprocessing, plan.isolation) as processes:
        for unit in inputs.list_units(plan.sources, _TRIES, plan.reading.keys):
            for read in READERS[unit.format](unit, plan.reading):
                image = (
                    decode_record(read, plan.preprocessing, processes)
                    if isinstance(read, ImageRecord)
                    else read
                )
                result = (
                    infer_batch([image], load(plan.model), plan.batch_size)[0][0]
                    if isinstance(image, DecodedImage)
                    else image
                )
                if isinstance(result, Features):
                    log.info("dry run: %s went through", result.ref.key)
                    return
                reasons.append(f"{result.key}: {result.message}")
    if reasons:
        raise RequestError(f"--input: none of the first images can be used; {reasons[0]}")
