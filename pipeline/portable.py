"""A run on a job server, as of Flink or Spark: what it must be given."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from pipeline.dataflow import view
from storage.errors import RequestError

_PATIENCE = 10.0  # seconds for a job server to take a connection; Beam would wait for minutes


def served(beam_args: Sequence[str]) -> bool:
    """Whether Beam's flags name a job server that runs already, by `--job_endpoint`."""
    endpoint, runner = view(beam_args, "PortableOptions").job_endpoint, _runner(beam_args)
    return endpoint not in (None, "embed") and not runner.startswith(("prism", "direct"))


def goes_on(beam_args: Sequence[str]) -> bool:
    """Whether the job goes on there without the launcher, which has started no part of it."""
    return served(beam_args) and view(beam_args, "PortableOptions").environment_type != "LOOPBACK"


def check(beam_args: Sequence[str]) -> None:
    """Raise RequestError where no job server answers, or its workers could not run the job."""
    if not served(beam_args):
        return
    told = view(beam_args, "PortableOptions")
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


def _runner(beam_args: Sequence[str]) -> str:
    return str(view(beam_args, "StandardOptions").runner or "direct").lower()
