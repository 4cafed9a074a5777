"""The pool that `pipeline.workers` serves: starts and stops Python workers as an engine asks.

Beam's own pool (apache_beam.runners.worker.worker_pool_main) starts workers that never see the
job's options, so that they have neither the credentials nor the addresses of stores; and `python`
is whatever PATH says.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from apache_beam.portability.api import (
    beam_fn_api_pb2,
    beam_fn_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    endpoints_pb2,
)
from google.protobuf import json_format, text_format

from storage.errors import RequestError

_GRACE = 10  # seconds that a worker has to end when asked to
_ANSWER = 60  # seconds for the engine to tell the job's options

log = logging.getLogger("pipeline.workers")


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Starts and stops workers, each a process of this interpreter, as an engine asks.

    `cores_each`: pin every worker to so many of the cores that this process may use, those that the
    fewest living ones have.
    """

    def __init__(self, cores_each: int | None = None):
        cores = sorted(os.sched_getaffinity(0))
        size = cores_each or len(cores)
        shares = [cores[at : at + size] for at in range(0, len(cores) - size + 1, size)]
        self._shares = shares or [cores]
        self._pinned: dict[subprocess.Popen[bytes], list[int]] = {}  # to which of the shares
        self._workers: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._ended = False

    def StartWorker(self, request: Any, context: Any) -> Any:
        """Start one worker; the answer tells what stood in the way, if anything did."""
        answer = beam_fn_api_pb2.StartWorkerResponse
        try:
            # A folder here called models would stand for ours.
            environment = {**os.environ, "PYTHONSAFEPATH": "1", **_environment(request)}
            with self._lock:
                if self._ended:
                    raise RuntimeError("the pool is ending, and starts no more workers")
                self._forget_ended()
                pinned = [self._pinned[process] for process in self._workers.values()]
                share = min(self._shares, key=pinned.count)
                process = subprocess.Popen(
                    [sys.executable, "-m", "apache_beam.runners.worker.sdk_worker_main"],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                )
                try:
                    os.sched_setaffinity(process.pid, share)
                except OSError:  # the container's cores are others by now
                    _end([process])
                    raise
                # Engines number workers from 1 each: by the id alone, one would stop another's.
                asker = context.peer(), request.worker_id
                before = self._workers.pop(asker, None)
                self._workers[asker] = process
                self._pinned = {p: self._pinned.get(p, share) for p in self._workers.values()}
            if before:  # which nobody would end any more
                _end([before])
        except Exception as error:  # whatever it is, the engine fails the job with it
            return answer(error=f"{type(error).__name__}: {error}")
        log.info("worker %s is process %d on cores %s", request.worker_id, process.pid, share)
        threading.Thread(target=_tell_end, args=(request.worker_id, process), daemon=True).start()
        return answer()

    def StopWorker(self, request: Any, context: Any) -> Any:
        """End the worker of that id; one that has ended is no error."""
        with self._lock:
            self._forget_ended()
            asker = context.peer(), request.worker_id
            if asker not in self._workers:
                # After an idle connection was closed an engine asks from another port.
                named = [key for key in self._workers if key[1] == request.worker_id]
                asker = named[0] if len(named) == 1 else asker
            process = self._workers.pop(asker, None)
        if process:
            _end([process])
        return beam_fn_api_pb2.StopWorkerResponse()

    def _forget_ended(self) -> None:
        ended = [key for key, process in self._workers.items() if process.poll() is not None]
        for key in ended:
            del self._workers[key]

    def stop_all(self) -> None:
        """End every worker; one whose start is under way is not started any more."""
        with self._lock:
            self._ended = True
            processes, self._workers = list(self._workers.values()), {}
        _end(processes)


def _environment(request: Any) -> dict[str, str]:
    """What Beam's worker reads from its environment, as its container would set it."""
    found = {"WORKER_ID": request.worker_id}
    services = {
        "CONTROL": request.control_endpoint,
        "LOGGING": request.logging_endpoint,
    }
    if request.provision_endpoint.url:
        told = _provision(request.provision_endpoint.url, request.worker_id)
        found["PIPELINE_OPTIONS"] = json_format.MessageToJson(told.pipeline_options)
        found["RUNNER_CAPABILITIES"] = " ".join(told.runner_capabilities)
        if told.HasField("control_endpoint"):
            services["CONTROL"] = told.control_endpoint
        if told.HasField("logging_endpoint"):
            services["LOGGING"] = told.logging_endpoint
        if told.HasField("status_endpoint"):
            services["STATUS"] = told.status_endpoint
    for name, service in services.items():
        if service.url:
            descriptor = endpoints_pb2.ApiServiceDescriptor(url=service.url)
            found[f"{name}_API_SERVICE_DESCRIPTOR"] = text_format.MessageToString(descriptor)
    return found


def _provision(url: str, worker_id: str) -> Any:
    """What the engine tells a worker of its job."""
    with grpc.insecure_channel(url) as channel:
        service = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        request = beam_provision_api_pb2.GetProvisionInfoRequest()
        metadata = (("worker_id", worker_id),)
        return service.GetProvisionInfo(
            request, metadata=metadata, timeout=_ANSWER, wait_for_ready=True
        ).info


def _tell_end(worker_id: str, process: subprocess.Popen[bytes]) -> None:
    log.info("worker %s, process %d, ended with %d", worker_id, process.pid, process.wait())


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve(host: str, port: int, cores_each: int | None) -> None:
    """Serve a pool until interrupted or terminated, then end all workers.

    Raises RequestError where the address cannot be listened at.
    """
    pool = WorkerPool(cores_each)
    # Else a second pool could share the port, and workers would start in either.
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    try:
        listened = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise RequestError(
            f"--host {host} --port {port}: cannot be listened at; give a free port, and an address "
            "of this machine"
        ) from None
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_end.set())
    server.start()
    log.info("listening on %s:%d", host, listened)
    asked_to_end.wait()
    server.stop(0)
    pool.stop_all()  # calls that the server has let in go on
