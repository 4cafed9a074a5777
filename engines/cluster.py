"""What every cluster here is: processes on free ports of this machine, and a pool of workers."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.processes import EngineError, Process, free_ports, listening, start, wait_for

START = 120  # seconds for a server to start, on a busy machine too
_STATE = "cluster.json"


@dataclass
class Cluster:
    """A cluster: its processes in the order of their start, its ports by name.

    Logs and state lie in `folder`; what the processes leave, below `folder`/tmp, goes with them.
    """

    folder: Path
    parallelism: int
    ports: dict[str, int]
    processes: list[Process] = field(default_factory=list)

    @classmethod
    def new(cls, folder: Path, parallelism: int, ports: Sequence[str]) -> Cluster:
        """A cluster of no process yet, with a free port for each name.

        Raises EngineError where one runs in `folder`: nobody could bring it down any more.
        """
        folder = folder.absolute()
        if (folder / _STATE).exists():
            running = [p.name for p in cls.load(folder).processes if p.group()]
            if running:
                raise EngineError(
                    f"{folder}: a cluster runs here ({', '.join(running)}); bring it down first, "
                    "or give another folder"
                )
            shutil.rmtree(folder / "tmp", ignore_errors=True)  # of a cluster that died
        elif (folder / "tmp").exists():
            raise EngineError(f"{folder / 'tmp'}: is there, and of no cluster; give another folder")
        (folder / "tmp").mkdir(parents=True)
        cluster = cls(folder, parallelism, dict(zip(ports, free_ports(len(ports)), strict=True)))
        cluster.save()  # from now on the folder is a cluster's
        return cluster

    @property
    def flags(self) -> list[str]:
        """What the job is given to run here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{self.ports['job']}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{self.ports['pool']}",
            f"--parallelism={self.parallelism}",
        ]

    @property
    def job_server(self) -> list[str]:
        """Where Beam's job server is to listen, as it takes it."""
        return [
            "--job-host=localhost",
            f"--job-port={self.ports['job']}",
            f"--artifact-port={self.ports['artifact']}",
            f"--expansion-port={self.ports['expansion']}",
            f"--artifacts-dir={self.folder}/tmp/artifacts",
        ]

    def process(self, name: str) -> Process:
        """The process of that name."""
        return next(process for process in self.processes if process.name == name)

    def begin(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start one process."""
        self.processes.append(start(name, argv, self.folder, env))
        self.save()

    def begin_pool(self, cores_each: int | None = None) -> None:
        """Start the pool of Python workers, each on `cores_each` cores where that is given."""
        argv = [sys.executable, "-m", "pipeline.workers", f"--port={self.ports['pool']}"]
        if cores_each:
            argv.append(f"--cores_each={cores_each}")
        self.begin("pool", argv)

    def wait_for_ports(self, *names: str) -> None:
        """Wait until something listens at each of these ports; EngineError with the logs."""
        for name in names:
            look = functools.partial(listening, self.ports[name])
            wait_for(f"port {name}", look, START, self.processes)

    def workers(self) -> list[int]:
        """The process ids of the Python workers that run now, the oldest first."""
        tasks = Path(f"/proc/{self.process('pool').pid}/task")
        children = (task / "children" for task in (tasks.iterdir() if tasks.exists() else ()))
        return sorted(int(pid) for path in children for pid in path.read_text().split())

    def down(self) -> None:
        """End every process, the last one first, and remove what they left on disk but logs."""
        for process in reversed(self.processes):
            process.stop()
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        (self.folder / _STATE).unlink(missing_ok=True)

    def save(self) -> None:
        """Note in the folder what `load` needs."""
        processes = [[p.name, p.pid, str(p.log), p.began] for p in self.processes]
        state = {"parallelism": self.parallelism, "ports": self.ports, "processes": processes}
        (self.folder / _STATE).write_text(json.dumps(state, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Cluster:
        """The cluster that was brought up in `folder`. Raises EngineError where none was."""
        try:
            state = json.loads((folder / _STATE).read_text())
        except FileNotFoundError:
            raise EngineError(f"{folder}: no cluster was brought up here") from None
        processes = [
            Process(name, pid, Path(log), began=began)
            for name, pid, log, began in state["processes"]
        ]
        return cls(folder, state["parallelism"], state["ports"], processes)


def command_line(module: str, up: Callable[..., Cluster], sizes: Mapping[str, str]) -> int:
    """`up FOLDER [sizes]`, which prints the job's flags, or `down FOLDER`; returns the exit code.

    `sizes`: the whole numbers that `up` takes by name, and what each is.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", allow_abbrev=False)
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("folder", type=Path, help="for logs and the state")
    for name, text in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, help=text)
    request = vars(parser.parse_args())
    command, folder = request.pop("command"), request.pop("folder")
    try:
        if command == "down":
            Cluster.load(folder).down()
        else:
            sys.stdout.write(" ".join(up(folder, **request).flags) + "\n")
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
