"""A standalone Spark cluster with Beam's job server and Python workers, on this machine.

    python -m engines.spark up out/spark     # prints the flags for pipeline.extract
    python -m engines.spark down out/spark

A master, two workers of one core, the job server (the driver), and a pool of Python workers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engines import java
from engines.cluster import Cluster, command_line
from engines.jars import jars

_EXECUTOR = "512m"  # heap of an executor


def up(folder: Path, workers: int = 2) -> Cluster:
    """Bring a cluster up, its logs in `folder`; EngineError with logs where it does not start."""
    lib = jars("spark")
    cluster = Cluster.new(folder, workers, ("master", "job", "artifact", "expansion", "pool"))
    home = cluster.folder / "tmp" / "home"
    home.mkdir()
    (home / "jars").symlink_to(lib)  # where Spark's workers look for what executors need
    log4j = java.write_log4j(cluster.folder)
    env = {
        "SPARK_HOME": str(home),
        "SPARK_SCALA_VERSION": "2.12",  # else looked for in build folders
        "SPARK_LOCAL_IP": "127.0.0.1",
    }

    def jvm(heap_mb: int, main: str, *args: str, flags: Sequence[str] = ()) -> list[str]:
        return java.command(f"{lib}/*", log4j, heap_mb, main, *args, flags=flags)

    deploy = "org.apache.spark.deploy"
    here = ("--host", "127.0.0.1")
    port = str(cluster.ports["master"])
    master = f"spark://127.0.0.1:{port}"
    try:
        at = (*here, "--port", port, "--webui-port", "0")
        cluster.begin("master", jvm(256, f"{deploy}.master.Master", *at), env)
        cluster.wait_for_ports("master")
        for number in range(workers):
            size = ("--cores", "1", "--memory", "1g", "--webui-port", "0")
            kept = ("--work-dir", f"{cluster.folder}/tmp/work-{number}")
            argv = jvm(192, f"{deploy}.worker.Worker", *here, *size, *kept, master)
            cluster.begin(f"worker-{number}", argv, env)
        settings = {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.executor.memory": _EXECUTOR,
            "spark.executor.cores": "1",
            "spark.executor.extraJavaOptions": " ".join(java.FLAGS),
            "spark.local.dir": f"{cluster.folder}/tmp",
            "spark.ui.enabled": "false",
        }
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        server = "org.apache.beam.runners.spark.SparkJobServerDriver"
        address = f"--spark-master-url={master}"
        cluster.begin("jobserver", jvm(512, server, address, *cluster.job_server, flags=flags), env)
        cluster.begin_pool()
        cluster.wait_for_ports("job", "pool")
    except BaseException:
        cluster.down()
        raise
    return cluster


if __name__ == "__main__":
    sys.exit(command_line("engines.spark", up, {"workers": "of one core each, default: 2"}))
