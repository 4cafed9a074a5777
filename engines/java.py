"""The command line of a JVM: bounded, logging to stdout, open where Flink and Spark reach in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# What Flink's and Spark's own start scripts open on Java 17.
_OPEN = (
    *("lang", "lang.invoke", "lang.reflect", "io", "net", "nio", "text", "time", "util"),
    *("util.concurrent", "util.concurrent.atomic", "util.concurrent.locks"),
)
FLAGS = (
    *(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPEN),
    *(
        f"--add-opens=java.base/sun.{package}=ALL-UNNAMED"
        for package in ("nio.ch", "nio.cs", "security.action", "util.calendar")
    ),
    "--add-opens=java.base/jdk.internal.ref=ALL-UNNAMED",
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    "--add-exports=java.rmi/sun.rmi.registry=ALL-UNNAMED",
    "-XX:+UseSerialGC",  # the smallest; two cores have no use for parallel collectors
    "-XX:TieredStopAtLevel=1",  # quick start before top speed: the work is in Python
)
_LOG4J = """\
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = Console
appender.console.type = Console
appender.console.name = Console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss.SSS} %-5p %c{1} - %m%n
"""


def write_log4j(folder: Path) -> Path:
    """The logging of every JVM of a cluster, to stdout."""
    path = folder / "log4j2.properties"
    path.write_text(_LOG4J)
    return path


def command(
    classpath: str, log4j: Path, heap_mb: int, main: str, *args: str, flags: Sequence[str] = ()
) -> list[str]:
    """`main` of `classpath` with a heap of at most `heap_mb` MiB."""
    return [
        "java",
        *FLAGS,
        *flags,
        f"-Xmx{heap_mb}m",
        f"-Dlog4j.configurationFile={log4j}",
        f"-Dlog4j2.configurationFile={log4j}",
        "-cp",
        classpath,
        main,
        *args,
    ]
