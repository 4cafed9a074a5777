"""A standalone Flink cluster with Beam's job server and Python workers, on this machine.

    python -m engines.flink up out/flink     # prints the flags for pipeline.extract
    python -m engines.flink down out/flink

One JobManager, two TaskManagers or more, the job server, and a pool of Python workers
(pipeline.workers), each a process of its own with its log in the folder, and its memory bounded:
the JVMs by their flags, a Python worker by what the model takes.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines import java
from engines.cluster import START, Cluster, command_line
from engines.jars import jars
from engines.processes import EngineError, wait_for

# A TaskManager's memory as Flink wants to be told of it, in MB: 1200 in all.
_MEMORY = {
    "taskmanager.memory.framework.heap.size": 96,
    "taskmanager.memory.task.heap.size": 240,
    "taskmanager.memory.framework.off-heap.size": 96,
    # Each job's gRPC has buffers of its own, which stay until its classes are collected: with 32
    # here the fourth or fifth job found none left, and waited for its workers for ever.
    "taskmanager.memory.task.off-heap.size": 224,
    "taskmanager.memory.network.min": 96,
    "taskmanager.memory.network.max": 96,
    "taskmanager.memory.managed.size": 64,
    "taskmanager.memory.jvm-metaspace.size": 256,
    "taskmanager.memory.jvm-overhead.min": 128,
    "taskmanager.memory.jvm-overhead.max": 128,
}
_CONF = """\
jobmanager.rpc.address: 127.0.0.1
jobmanager.rpc.port: {rpc}
jobmanager.bind-host: 127.0.0.1
rest.address: 127.0.0.1
rest.bind-address: 127.0.0.1
rest.port: {rest}
rest.bind-port: {rest}
taskmanager.host: 127.0.0.1
taskmanager.bind-host: 127.0.0.1
taskmanager.numberOfTaskSlots: {slots}
cluster.evenly-spread-out-slots: true
io.tmp.dirs: {folder}/tmp
blob.storage.directory: {folder}/tmp
# Else one TaskManager alone has too few buffers to take over the others' subtasks.
taskmanager.network.sort-shuffle.min-buffers: 64
# A lost TaskManager or worker costs a restart of the job, not the job.
restart-strategy.type: fixed-delay
restart-strategy.fixed-delay.attempts: 8
restart-strategy.fixed-delay.delay: 5 s
heartbeat.interval: 2000
heartbeat.timeout: 20000
"""


def ask(cluster: Cluster, path: str) -> Any:
    """What the JobManager's REST service answers at `path`."""
    address = f"http://127.0.0.1:{cluster.ports['rest']}{path}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def up(
    folder: Path,
    task_managers: int = 2,
    slots: int = 2,
    parallelism: int = 2,
    cores_each: int | None = None,
) -> Cluster:
    """Bring a cluster up, its logs in `folder`; EngineError with logs where it does not start.

    Raises EngineError too where `parallelism` is more than all slots: no job could start.
    `slots`: of each TaskManager; more than `parallelism` needs, so that the others can take over
    from a lost one. `cores_each`: cores that each Python worker is pinned to.
    """
    if parallelism > task_managers * slots:
        raise EngineError(
            f"--parallelism {parallelism}: {task_managers} TaskManagers of {slots} slots have only "
            f"{task_managers * slots}, and no job would start; give more --slots"
        )
    classpath = f"{jars('flink')}/*"
    cluster = Cluster.new(
        folder, parallelism, ("rpc", "rest", "job", "artifact", "expansion", "pool")
    )
    conf = _CONF.format(slots=slots, folder=cluster.folder, **cluster.ports)
    (cluster.folder / "flink-conf.yaml").write_text(conf)
    log4j = java.write_log4j(cluster.folder)

    def jvm(heap_mb: int, main: str, *args: str, flags: Sequence[str] = ()) -> list[str]:
        return java.command(classpath, log4j, heap_mb, main, *args, flags=flags)

    where = ("--configDir", str(cluster.folder))
    runtime = "org.apache.flink.runtime"
    try:
        master = f"{runtime}.entrypoint.StandaloneSessionClusterEntrypoint"
        cluster.begin("jobmanager", jvm(256, master, *where))
        memory = [word for key, mb in _MEMORY.items() for word in ("-D", f"{key}={mb}m")]
        heap = _MEMORY["taskmanager.memory.framework.heap.size"]
        heap += _MEMORY["taskmanager.memory.task.heap.size"]
        direct = ("framework.off-heap.size", "task.off-heap.size", "network.max")
        most = sum(_MEMORY[f"taskmanager.memory.{name}"] for name in direct)
        limits = (f"-XX:MaxDirectMemorySize={most}m", "-XX:MaxMetaspaceSize=256m")
        manager = f"{runtime}.taskexecutor.TaskManagerRunner"
        settings = (*where, "-D", "taskmanager.cpu.cores=1", *memory)
        for number in range(task_managers):
            cluster.begin(f"taskmanager-{number}", jvm(heap, manager, *settings, flags=limits))
        server = "org.apache.beam.runners.flink.FlinkJobServerDriver"
        address = f"--flink-master=127.0.0.1:{cluster.ports['rest']}"
        cluster.begin("jobserver", jvm(384, server, address, *cluster.job_server))
        cluster.begin_pool(cores_each)
        cluster.wait_for_ports("rest", "job", "pool")
        wait_for(
            "TaskManagers", lambda: _managers(cluster) == task_managers, START, cluster.processes
        )
    except BaseException:
        cluster.down()
        raise
    return cluster


def _managers(cluster: Cluster) -> int:
    try:
        return len(ask(cluster, "/taskmanagers")["taskmanagers"])
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(
        command_line(
            "engines.flink",
            up,
            {
                "task_managers": "default: 2",
                "slots": "of each TaskManager, default: 2",
                "parallelism": "of the job, default: 2",
                "cores_each": "cores that each Python worker is pinned to, default: all",
            },
        )
    )
