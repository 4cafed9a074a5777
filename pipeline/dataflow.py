"""A run on Dataflow: what it must be given, what it is given besides, and what its workers are.

Everything is decided from the flags alone; no cloud is called.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import handles
from pipeline.options import Options
from storage import files
from storage.errors import RequestError

_SETUP_FILE = Path(__file__).parents[1] / "setup.py"
# Whose vCPUs do not follow from the GPUs in the name, from Compute Engine's list of machines.
_ODD_MACHINES = {"a2-megagpu-16g": 96}
_ONE_PROCESS, _PROCESS_A_CORE = "no_use_multiple_sdk_containers", "use_multiple_sdk_containers"
# Bundles at once in a worker's one process: some are read and decoded while one is in the model.
# Each holds up to 64 MiB of encoded pictures and some 100 MB of decoded ones.
_HARNESS_THREADS = 4
# TensorFlow 2.21 is built for CUDA 12.5, which no driver before 525 runs.
_DRIVER = "install-nvidia-driver:5xx"


@dataclass(frozen=True)
class Workers:
    """What a worker has: whether a GPU, and how many vCPUs."""

    gpu: bool
    cores: int


def is_dataflow(beam_args: Sequence[str]) -> bool:
    """Whether Beam's flags name Dataflow's runner, however it is spelt."""
    name = view(beam_args, "StandardOptions").runner or ""
    return name.lower().rpartition(".")[2].removesuffix("runner") == "dataflow"


@contextlib.contextmanager
def uncalled() -> Iterator[None]:
    """Let Beam's check of its flags ask no cloud, where it would even make a bucket."""
    from apache_beam.options.pipeline_options import GoogleCloudOptions as Flags

    # The bucket for want of --temp_location; a warning of a bucket that keeps what is deleted.
    asking = ("_create_default_gcs_bucket", "_warn_if_soft_delete_policy_enabled")
    before = {name: getattr(Flags, name) for name in asking}
    for name in asking:
        setattr(Flags, name, lambda *_: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Flags, name, method)


def accelerator(gpu: str | None) -> str | None:
    """Beam's resource hint for one GPU of the type `gpu`, its driver put in by the service."""
    return f"type:{gpu};count:1;{_DRIVER}" if gpu else None


def workers(options: Options, beam_args: Sequence[str]) -> Workers:
    """The workers that the flags ask for; one core where the machine's name does not tell."""
    machine = view(beam_args, "WorkerOptions").machine_type or ""
    gpu = bool(options.gpu or _told_accelerators(beam_args))
    return Workers(gpu, _cores(machine))


def _cores(machine: str) -> int:
    """vCPUs of a machine by its name; 1 where it does not tell."""
    if machine in _ODD_MACHINES:
        return _ODD_MACHINES[machine]
    if gpus := re.search(r"^a(\d)-\w+gpu-(\d+)g$", machine):
        return {"2": 12, "3": 26}.get(gpus[1], 1) * int(gpus[2])  # a2-highgpu-2g: two GPUs
    named = re.search(r"custom-(\d+)-\d+", machine)
    named = named or re.search(r"-(\d+)(-lssd|-metal)?$", machine)
    return int(named[1]) if named else 1


def check(options: Options, beam_args: Sequence[str]) -> None:
    """Raise RequestError for what would fail on workers, or on the service, long after this."""
    here = {
        "--input": options.input,
        "--model": (options.model,) if not handles.archive_url(options.model) else (),
        "--output": (options.output,) if options.output else (),
    }
    for flag, paths in here.items():
        for path in paths:
            if not files.is_remote(path):
                raise RequestError(
                    f"{flag} {path}: a path of this machine, which no Dataflow worker sees; put it "
                    "on gs://"
                )
    setup = view(beam_args, "SetupOptions")
    if not (
        view(beam_args, "WorkerOptions").sdk_container_image
        or setup.requirements_file
        or setup.prebuild_sdk_container_engine
    ):
        raise RequestError(
            "--runner DataflowRunner needs --sdk_container_image: Beam's own image has no "
            "TensorFlow, and every bundle would fail; deploy/README.md tells how to build ours"
        )
    told = _told_accelerators(beam_args)
    service = [name for name in told if name.startswith("worker_accelerator")]
    hints = [name for name in told if name not in service]
    if service and (options.gpu or hints):
        raise RequestError(
            f"{service[0]}: every worker's GPU, beside {'--gpu' if options.gpu else hints[0]}, a "
            "resource hint; Dataflow takes one of the two; give --gpu alone"
        )
    if options.gpu and hints:
        raise RequestError(
            f"--resource_hints {hints[0]}: for all steps, beside --gpu for inference; give one"
        )
    if service and options.engine == "openvino":
        raise RequestError(
            f"{service[0]}: --engine openvino computes on CPUs, so the GPU would idle; leave one "
            "of them out"
        )
    goal = view(beam_args, "GoogleCloudOptions").flexrs_goal
    if goal and (options.gpu or told):
        raise RequestError(
            f"--flexrs_goal {goal}: flexible scheduling has no GPUs; leave it or the GPU out"
        )


def _told_accelerators(beam_args: Sequence[str]) -> list[str]:
    """GPUs that Beam's own flags ask for, as written there."""
    told = [
        *(view(beam_args, "GoogleCloudOptions").dataflow_service_options or ()),
        *(view(beam_args, "DebugOptions").experiments or ()),
        *(view(beam_args, "StandardOptions").resource_hints or ()),
    ]
    return [
        word for word in told if word.partition("=")[0] in ("worker_accelerator", "accelerator")
    ]


def completed(beam_args: Sequence[str]) -> list[str]:
    """`beam_args`, and what they leave open: this code for the workers, and one process on each.

    Pillow and TensorFlow release Python's lock, so that one process uses every core and holds one
    model; a process a core would hold as many models, and on a GPU share its memory among them.
    """
    added = []
    setup = view(beam_args, "SetupOptions")
    if setup.setup_file:
        # Beam changes into the folder part of it, of which `setup.py` has none.
        added += ["--setup_file", str(Path(setup.setup_file).absolute())]
    elif not setup.extra_packages and _SETUP_FILE.exists():
        added += ["--setup_file", str(_SETUP_FILE)]
    debug = view(beam_args, "DebugOptions")
    if not {_ONE_PROCESS, _PROCESS_A_CORE} & set(debug.experiments or ()):
        added += ["--experiments", _ONE_PROCESS]
    if debug.number_of_worker_harness_threads is None:
        added += ["--number_of_worker_harness_threads", str(_HARNESS_THREADS)]
    return [*beam_args, *added]


def sends_code(beam_args: Sequence[str]) -> bool:
    """Whether workers are sent this code; else their image must hold it."""
    setup = view(beam_args, "SetupOptions")
    return bool(setup.setup_file or setup.extra_packages or _SETUP_FILE.exists())


def is_waited_for(beam_args: Sequence[str]) -> bool:
    """Whether the launcher stays until the job has ended."""
    templated = view(beam_args, "GoogleCloudOptions").template_location
    return not (view(beam_args, "StandardOptions").no_wait_until_finish or templated)


def unbounded(beam_args: Sequence[str]) -> bool:
    """Whether no flag bounds how many workers the service may start."""
    told = view(beam_args, "WorkerOptions")
    return told.max_num_workers is None and told.autoscaling_algorithm != "NONE"


def view(beam_args: Sequence[str], name: str) -> Any:
    """Beam's flags as its class of options `name` has them."""
    from apache_beam.options import pipeline_options

    options = pipeline_options.PipelineOptions(list(beam_args))
    return options.view_as(getattr(pipeline_options, name))
