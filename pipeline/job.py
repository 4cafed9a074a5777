"""One run: check everything that can be checked first, run the graph, tell the verdict."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from formats import dataset, isolation
from formats.manifest import read_manifest
from formats.timing import advice
from models import prepared
from pipeline import dataflow, portable, preflight
from pipeline.options import Options
from storage import files, stdio, temporaries
from storage.errors import RequestError, RunError
from storage.secrets import hide

if TYPE_CHECKING:
    from pipeline.graph import Plan

COMPLETE, TOO_MANY, FAILED, DRY_RUN = "complete", "too_many_failures", "failed", "dry_run"
COUNTED = "counted"  # --sink null
SUBMITTED = "submitted"  # handed to a service, and not waited for
EXIT_CODES = {COMPLETE: 0, COUNTED: 0, DRY_RUN: 0, SUBMITTED: 0, FAILED: 1, TOO_MANY: 3}
COUNTS = ("images", "features", "failures", "skipped")
_AWAY = "the job may go on where it runs: cancel it there, or let it end"
_RESUME = "--if_exists resume goes on from here"
# What such a run has written lies beside the old rows, of which resuming would keep those.
_OVERWRITE = "run it again with --if_exists overwrite; the old output stands"
_NOTHING = "it wrote nothing; run it again"
_THROWN = re.compile(r"^(?:[\w.]+[.])?(\w*(?:Error|Exception|Exit|Interrupt|Memory)): *(.+)$", re.M)
# The flag that may mend a reason, where it is the commonest.
_FLAGS = {
    "read/MissingFeature": "--image_key names what holds the picture",
    "read/TooManyBytes": "--max_image_bytes lets larger files in",
    "read/HttpNotAllowed": "--allow_http lets addresses be fetched",
    "decode/UnsupportedFormat": "--formats lets further ones in",
    "decode/TooManyPixels": "--max_image_pixels lets larger pictures in",
    "decode/DecodeTimeout": "--decode_seconds gives each picture longer",
    "decode/DecoderOutOfMemory": "--decode_memory gives each picture more",
}
left_behind = _RESUME  # what is to be said of a run that ends before its time

log = logging.getLogger("pipeline")


def run(options: Options, beam_args: Sequence[str]) -> dict[str, Any]:
    """Run the job; returns what the JSON line tells. Raises RequestError before any work."""
    global left_behind
    left_behind = _OVERWRITE if options.if_exists == "overwrite" else _RESUME
    if options.sink == "null" or options.dry_run:
        left_behind = _NOTHING
    try:
        return _run(options, beam_args)
    finally:
        left_behind = _RESUME
        isolation.drop_ahead()
        prepared.drop_ahead()


def _run(options: Options, beam_args: Sequence[str]) -> dict[str, Any]:
    started = time.time()
    run_id = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime(started)) + uuid.uuid4().hex[:8]
    try:
        plan = preflight.make_plan(options, beam_args, run_id, started)
        if options.dry_run:
            preflight.try_one_image(plan)
            return summary(plan.publication.output, DRY_RUN, None, started)
    except RequestError:
        raise
    except (RunError, OSError, pa.ArrowException) as error:
        raise RequestError(failure_line(error)) from error
    except Exception as error:  # a fault of ours or of a store's client, whose text needs hiding
        output = None if options.sink == "null" else files.absolute(options.output)
        return failed(output, error, started)
    from pipeline import progress  # here, since it imports Beam

    global left_behind
    waited = dataflow.is_waited_for(beam_args)
    away = dataflow.is_dataflow(beam_args) or portable.goes_on(beam_args)
    if away:
        wrote = left_behind != _NOTHING
        left_behind = f"{_AWAY}; after that only {left_behind}" if wrote else _AWAY
    ended = False
    try:
        with contextlib.nullcontext() if options.quiet else progress.told(options.stop_after):
            result = run_graph(plan, beam_args)
        if plan.sink == "null":
            if not waited:
                return submitted(None, run_id, started)
            status, counts = counted(result, options)
            if status == TOO_MANY:
                _tell_of_failures(options, counts, counts["failures_by"])
            return summary(None, status, counts, started)
        verdict = dataset.read_verdict(plan.publication.output, run_id)
        ended = verdict is not None
        if verdict is None and not waited:
            return submitted(plan.publication.output, run_id, started)
        if verdict is None:
            raise RunError(f"run {run_id} ended without a verdict in {options.output}")
        with contextlib.suppress(OSError):  # of a store that is gone: the verdict stands
            if verdict["status"] != COMPLETE:
                folder = files.join(plan.publication.output, "_failed", run_id)
                manifest = read_manifest(folder)
                if manifest:
                    judged, reasons = manifest["judged"], manifest["failures_by"]
                    _tell_of_failures(options, judged, reasons, folder)
            elif not options.quiet:
                _advise(plan.publication.output)
        return summary(plan.publication.output, verdict["status"], verdict["run"], started)
    except Exception as error:
        told = left_behind if away and not _is_verdict(error) else None
        return failed(plan.publication.output, error, started, told)
    finally:
        # Else the job may read it yet, here or there, and its commit removes it.
        if plan.finished and (ended or preflight.runs_here(beam_args)):
            try:
                files.delete([plan.finished])
            except OSError as error:  # the verdict stands all the same; the next run removes it
                log.warning("%s", failure_line(error))


def failed(
    output: str | None, error: BaseException, started: float, more: str | None = None
) -> dict[str, Any]:
    """The JSON line of a run that `error` ended, which is logged, with what `more` there is."""
    temporaries.abandon_all()  # a runner need not tear down the bundle that failed
    log.error("%s", "; ".join(filter(None, (failure_line(error), more))))
    return summary(output, FAILED, None, started)


def _advise(output: str) -> None:
    """Log where the time went and what would mend it."""
    manifest = read_manifest(output)
    if manifest is None:
        return
    vectors = manifest["options"]["outputs"] or manifest["model"]["outputs"]
    line = advice(manifest["timing"], manifest["options"], len(vectors))
    if line:
        log.info("%s", line)


def _tell_of_failures(
    options: Options,
    counts: Mapping[str, int],
    reasons: Mapping[str, int],
    folder: str | None = None,
) -> None:
    """Log why nothing was published, and what to do about it; `folder` tells of each image.

    `counts`: of the images that were judged, how many `failures`.
    """
    published = f", so nothing was published; each is told of in {folder}" if folder else ""
    # The failures lie in the output, which is no empty one any more.
    again = ", with --if_exists resume" if folder and options.if_exists == "error" else ""
    most = Counter(reasons).most_common(3)
    often = ", ".join(f"{count} {reason}" for reason, count in most)
    flag = _FLAGS.get(most[0][0]) if most else None
    log.error(
        "%d of %d images failed (%s), more than --max_failure_rate %g allows%s; mend the input%s, "
        "or give a larger --max_failure_rate%s",
        counts["failures"],
        counts["images"],
        often,
        options.max_failure_rate,
        published,
        f" ({flag})" if flag else "",
        again,
    )


def run_graph(plan: Plan, beam_args: Sequence[str]) -> Any:
    """Build and run the graph, and wait for it unless Beam is told not to; Beam's result."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import StandardOptions

    from pipeline import graph

    if dataflow.is_dataflow(beam_args):
        beam_args = dataflow.completed(beam_args)
    beam_options = graph.JobOptions(list(beam_args))
    standard = beam_options.view_as(StandardOptions)
    standard.runner = preflight.runner_of(standard.runner)
    with beam.Pipeline(options=beam_options) as pipeline:
        temporaries.track(pipeline.local_tempdir)  # an interrupted run takes it along
        graph.build(pipeline, plan)
    return pipeline.result


def counted(result: Any, options: Options) -> tuple[str, dict[str, Any]]:
    """Status and counts of a run that wrote nothing, from Beam's counters.

    `passed` stands beside the counts where a step was the last, which makes no rows.
    """
    from apache_beam.metrics import MetricsFilter

    from transforms.sink import FAILED

    found = result.metrics().query(MetricsFilter().with_namespace("Count"))["counters"]
    values: Counter[str] = Counter()
    for counter in found:
        values[counter.key.metric.name] += counter.result
    reasons = {name.removeprefix(FAILED): values[name] for name in sorted(values) if FAILED in name}
    failures = sum(reasons.values())
    last = "passed" if options.stop_after else "features"
    images = values[last] + failures
    counts = {"images": images, "features": values["features"], "failures": failures, "skipped": 0}
    if options.stop_after:
        counts["passed"] = values["passed"]
    too_many = images and failures / images > options.max_failure_rate
    status = TOO_MANY if too_many else COUNTED
    return status, {**counts, "failures_by": reasons}


def _is_verdict(error: BaseException) -> bool:
    """Whether `error` tells that the job has ended; any other is of the way to it."""
    told = ("failed in state", "pipeline failed. State:")  # job servers, Dataflow
    return isinstance(error, RunError) or any(words in str(error) for words in told)


def failure_line(error: BaseException) -> str:
    """What went wrong in one line under 1 kB; the first cause, not Beam's wrapping."""
    while error.__cause__ is not None and not isinstance(error, RunError):
        error = error.__cause__
    name, text = type(error).__name__, str(error)
    _, traceback, far = text.partition("Traceback (most recent call last)")
    if traceback and (thrown := _THROWN.search(far)):  # a worker's, as an engine hands it on
        name, text = thrown[1], thrown[2].partition(" [while running ")[0]
    text = hide(" ".join(text.split()))[:800]
    if not text:
        return f"{name}, without a reason"
    return text if name == "RunError" else f"{name}: {text}"


def summary(
    output: str | None, status: str, counts: Mapping[str, Any] | None, started: float
) -> dict[str, Any]:
    """The JSON line of a run; `counts` are images, features, failures and skipped of this run.

    `output` is None where nothing is written; further counts are told as they are.
    """
    counts = counts or dict.fromkeys(COUNTS, 0)
    seconds = time.time() - started
    manifest = files.join(output, "manifest.json") if output else None
    done = counts["images"] - counts["skipped"]
    return {
        "status": status,
        "output": output or None,
        "manifest": manifest if status == COMPLETE else None,
        **counts,
        "seconds": round(seconds, 3),
        "images_per_second": round(done / seconds, 3) if seconds else 0.0,
    }


def submitted(output: str | None, run_id: str, started: float) -> dict[str, Any]:
    """The JSON line of a run that is not waited for: what it will count is not known yet."""
    unknown = dict.fromkeys((*COUNTS, "images_per_second"))
    return {**summary(output, SUBMITTED, None, started), **unknown, "run_id": run_id}


def tell(result: Mapping[str, Any]) -> int:
    """Print the JSON line as the last of stdout; returns the exit code, whoever reads the line."""
    line = json.dumps(result)
    if error := stdio.tell(line):  # the run is what it is
        log.warning("stdout takes no line (%s): %s", error, line)
    return EXIT_CODES[result["status"]]
