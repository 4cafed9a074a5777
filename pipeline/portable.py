"""A run on a job server, as of Flink or Spark: what it must be given."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from pipeline.dataflow import view
from storage.errors import RequestError

_ELSEWHERE = (
    "--job_endpoint",
    "--flink_master",
    "--spark_master_url",
    "--prism_location",
    "--sdk_container_image",
    "--machine_type",
    "--worker_machine_type",
    "--num_workers",
    "--max_num_workers",
)
_PATIENCE = 10.0  # seconds for a job server to take a connection; Beam would wait for minutes


def served(beam_args: Sequence[str]) -> bool:
    """Whether Beam's flags name a job server that runs already, by `--job_endpoint`."""
    endpoint, runner = view(beam_args, "PortableOptions").job_endpoint, _runner(beam_args)
    return endpoint not in (None, "embed") and not runner.startswith(("prism", "direct"))


def goes_on(beam_args: Sequence[str]) -> bool:
    """Whether the job goes on there without the launcher, which has started no part of it."""
    return served(beam_args) and view(beam_args, "PortableOptions").environment_type != "LOOPBACK"


def names(beam_args: Sequence[str]) -> list[str]:
    """The flags among Beam's words, without their values."""
    return [word.partition("=")[0] for word in beam_args if word.startswith("--")]


def of_other_runners(beam_args: Sequence[str]) -> list[str]:
    """Those of the flags that say where a job runs, or on what, as DirectRunner never asks."""
    return [name for name in dict.fromkeys(names(beam_args)) if name in _ELSEWHERE]


def check(beam_args: Sequence[str]) -> None:
    """Raise RequestError where no job server answers, or its workers could not run the job."""
    told = view(beam_args, "PortableOptions")
    if _runner(beam_args) in ("portable", "portablerunner") and told.job_endpoint is None:
        raise RequestError(
            "--runner PortableRunner: needs --job_endpoint, the HOST:PORT of a job server; "
            "docs/ENGINES.md tells how to start one"
        )
    _check_staged(beam_args)
    if not served(beam_args):
        return
    docker = told.environment_type in (None, "DOCKER")
    if docker and not (told.environment_config or told.environment_options):
        raise RequestError(
            "--environment_type is not given: workers would be Beam's own Docker image, which has "
            "no TensorFlow; give EXTERNAL and --environment_config (docs/ENGINES.md), or DOCKER "
            "and as --environment_config an image (--sdk_container_image is for Dataflow)"
        )
    host, _, port = told.job_endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]") or "localhost", int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise RequestError(
            f"--job_endpoint {told.job_endpoint}: no job server answers there ({error}); start it, "
            "or give the HOST:PORT of one that runs"
        ) from None


def _check_staged(beam_args: Sequence[str]) -> None:
    """Raise RequestError for files that the launcher would send along, or run, and are not there.

    Beam looks for them once all else is done.
    """
    setup, binary = view(beam_args, "SetupOptions"), view(beam_args, "PrismRunnerOptions")
    for flag, paths in {
        "--setup_file": [setup.setup_file],
        "--requirements_file": [setup.requirements_file],
        "--extra_package": setup.extra_packages or [],
        "--prism_location": [binary.prism_location],
    }.items():
        for path in filter(None, paths):
            if "://" not in path and not os.path.isfile(path):
                raise RequestError(f"{flag} {path}: no such file, and the job needs it")
    if setup.setup_file and os.path.basename(setup.setup_file) != "setup.py":
        raise RequestError(f"--setup_file {setup.setup_file}: Beam takes one named setup.py only")


def _runner(beam_args: Sequence[str]) -> str:
    return str(view(beam_args, "StandardOptions").runner or "direct").lower()
