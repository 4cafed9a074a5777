"""The pool of Python workers: what a worker is told, and that each asker stops only its own."""

from __future__ import annotations

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from apache_beam.portability.api import (
    beam_fn_api_pb2,
    beam_fn_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    endpoints_pb2,
)
from apache_beam.runners.worker import sdk_worker_main
from google.protobuf import json_format

from pipeline import workers
from pipeline.pool import WorkerPool, _environment


class Provision(beam_provision_api_pb2_grpc.ProvisionServiceServicer):
    """An engine that tells workers of its job."""

    def GetProvisionInfo(self, request, context):
        self.asked = dict(context.invocation_metadata())["worker_id"]
        info = beam_provision_api_pb2.ProvisionInfo(runner_capabilities=["one", "two"])
        options = {"beam:option:s3_endpoint_url:v1": "http://127.0.0.1:1"}
        json_format.ParseDict(options, info.pipeline_options)
        return beam_provision_api_pb2.GetProvisionInfoResponse(info=info)


@contextlib.contextmanager
def served(add, servicer):
    """The address of a gRPC server of `servicer`."""
    server = grpc.server(ThreadPoolExecutor(4))
    add(servicer, server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def served_pool(**how):
    """A pool, and an engine's way to it: one channel for each asker."""
    pool = WorkerPool(**how)
    add = beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server
    with served(add, pool) as address, contextlib.ExitStack() as channels:

        def ask():
            # Else gRPC would share one connection among the channels of a process.
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = channels.enter_context(grpc.insecure_channel(address, options))
            return beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)

        try:
            yield pool, ask
        finally:
            pool.stop_all()


def start_request(worker_id="1-1", provision=""):
    def at(url):
        return endpoints_pb2.ApiServiceDescriptor(url=url)

    return beam_fn_api_pb2.StartWorkerRequest(
        worker_id=worker_id,
        control_endpoint=at("localhost:1"),
        provision_endpoint=at(provision),
    )


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_is_told_the_options_of_its_job():
    provision = Provision()
    add = beam_provision_api_pb2_grpc.add_ProvisionServiceServicer_to_server
    with served(add, provision) as address:
        told = _environment(start_request("7-1", address))
    assert provision.asked == told["WORKER_ID"] == "7-1"
    assert told["RUNNER_CAPABILITIES"] == "one two"
    assert "localhost:1" in told["CONTROL_API_SERVICE_DESCRIPTOR"]
    options = sdk_worker_main._load_pipeline_options(told["PIPELINE_OPTIONS"])
    assert options == {"s3_endpoint_url": "http://127.0.0.1:1"}


def test_of_two_workers_with_one_id_each_asker_stops_its_own():
    with served_pool() as (pool, ask):
        first, second = ask(), ask()
        assert not first.StartWorker(start_request()).error
        assert not second.StartWorker(start_request()).error
        one, other = (process.pid for process in pool._workers.values())
        stop = beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1")
        first.StopWorker(stop)
        assert (running(one), running(other)) == (False, True)
        second.StopWorker(stop)
        assert not running(other)
        second.StopWorker(stop)  # it has ended: no error


def test_a_worker_is_stopped_by_its_asker_from_another_port_where_its_id_is_unique():
    with served_pool() as (pool, ask):
        assert not ask().StartWorker(start_request("1-1")).error
        assert not ask().StartWorker(start_request("1-2")).error
        pids = {key[1]: process.pid for key, process in pool._workers.items()}
        ask().StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"))
        assert (running(pids["1-1"]), running(pids["1-2"])) == (False, True)


def test_of_two_workers_with_one_id_a_stranger_stops_neither():
    with served_pool() as (pool, ask):
        for _ in range(2):
            assert not ask().StartWorker(start_request()).error
        ask().StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"))
        assert all(running(process.pid) for process in pool._workers.values())
        assert len(pool._workers) == 2


def test_workers_that_have_ended_are_forgotten():
    """Else a killed one would keep the id of the next from being unique."""
    with served_pool() as (pool, ask):
        ask().StartWorker(start_request())
        (dead,) = pool._workers.values()
        dead.kill()
        dead.wait()
        ask().StartWorker(start_request())
        (alive,) = pool._workers.values()
        assert alive is not dead
        ask().StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"))
        assert not running(alive.pid)


def test_two_pools_do_not_share_a_port(capsys):
    first = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 1)])
    port = first.add_insecure_port("localhost:0")
    first.start()
    try:
        assert workers.main(["--port", str(port)]) == 2
        told = f"error: --host localhost --port {port}: cannot be listened at; give a free port"
        assert capsys.readouterr().err.startswith(told)
    finally:
        first.stop(0).wait()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "-1"], "--port -1: must be 0 to 65535"),
        (["--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--port", "1", "--cores_each", "0"], "--cores_each 0: must be 1 to "),
        (["--port", "1", "--cores_each", "9999"], "--cores_each 9999: must be 1 to "),
        (["--port", "one"], "argument --port: invalid int value: 'one'"),
        (["--host", "no.such.host.invalid", "--port", "1"], "--host no.such.host.invalid --port 1"),
    ],
)
def test_what_a_pool_cannot_be_is_told_in_one_line(words, told, capsys):
    assert workers.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


def test_no_worker_outlives_the_pool():
    with served_pool() as (pool, ask):
        ask().StartWorker(start_request())
        (process,) = pool._workers.values()
    assert not running(process.pid)


def test_a_start_that_is_under_way_when_the_pool_ends_leaves_no_worker(monkeypatch):
    with served_pool() as (pool, ask):
        monkeypatch.setattr("pipeline.pool._environment", lambda request: pool.stop_all() or {})
        assert "the pool is ending" in ask().StartWorker(start_request()).error
        assert not pool._workers


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_workers_are_pinned_where_the_fewest_are():
    with served_pool(cores_each=1) as (pool, ask):
        for number in range(2):
            ask().StartWorker(start_request(f"{number}-1"))
        ask().StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="1-1"))
        ask().StartWorker(start_request("2-1"))  # in turn it would share a core
        cores = [os.sched_getaffinity(process.pid) for process in pool._workers.values()]
    assert [len(share) for share in cores] == [1, 1]
    assert cores[0] != cores[1]


def test_an_id_that_is_asked_for_twice_leaves_no_worker_behind():
    with served_pool() as (pool, ask):
        stub = ask()
        stub.StartWorker(start_request())
        (first,) = pool._workers.values()
        stub.StartWorker(start_request())
        first.wait(10)
        (second,) = pool._workers.values()
        assert second.poll() is None


def test_a_worker_that_cannot_be_pinned_is_ended(monkeypatch):
    started = []

    def refuse(pid, _):
        started.append(pid)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with served_pool() as (pool, ask):
        assert "Invalid argument" in ask().StartWorker(start_request()).error
        assert not pool._workers
        assert not running(*started)


def test_what_stands_in_the_way_is_the_answer(monkeypatch):
    monkeypatch.setattr("pipeline.pool._ANSWER", 0.2)
    with served_pool() as (pool, ask):
        answer = ask().StartWorker(start_request(provision="localhost:1"))
        assert "DEADLINE_EXCEEDED" in answer.error
        assert not pool._workers
