"""A model on its way: cut, flipped, killed; and a machine without any network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from benchmarks.faults.world import ROOT, Row, World, words, write_files
from models import handles
from models.export import write_archive
from storage.errors import RequestError
from tests import servers

FLIPS = 200
_SOON = 10.0  # seconds for the run after a killed one
_VETH = """
ip link set lo up
ip link add out0 type veth peer name out1
for link in out0 out1; do echo 1 > /proc/sys/net/ipv6/conf/$link/disable_ipv6; ip link set $link up
done 2>/dev/null
ip addr add 192.0.2.1/24 dev out0
ip route add default via 192.0.2.2 dev out0
"$@"
code=$?
awk '/out0:/ {print "packets", $11}' /proc/net/dev >&2
exit $code
"""


def check(world: World) -> Iterator[Row]:
    """The rows of the table."""
    cache = world.fresh("cache")
    with (
        servers.http_site() as site,
        mock.patch.dict(os.environ, {"IMAGE_FEATURES_CACHE": str(cache)}),
        mock.patch.object(handles, "_PAUSE_SECONDS", 0.0),
    ):
        archive = world.folder / "m.tar.gz"
        archive.unlink(missing_ok=True)
        write_archive(str(world.model), str(archive))
        data = archive.read_bytes()
        yield damaged(world, site, cache, data)
        yield killed(world, site, cache, data)
    yield without_network(world)


def damaged(world: World, site: servers.Site, cache: Path, data: bytes) -> Row:
    """Archives cut anywhere, and with one bit flipped anywhere; then the whole one."""
    accepted = poisoned = 0
    cuts = [world.random.randrange(len(data)) for _ in range(world.times)]
    flips = [world.random.randrange(8 * len(data)) for _ in range(FLIPS * world.times // 20)]
    for number, at in enumerate([*cuts, *flips]):
        if number < len(cuts):
            url = site.give("/m.tar.gz", data, sent=at)
        else:
            altered = bytearray(data)
            altered[at // 8] ^= 1 << at % 8
            url = site.give("/m.tar.gz", bytes(altered))
        try:
            folder = handles.resolve(url)
        except RequestError as error:
            accepted += "\n" in str(error) or len(str(error)) > 1000
        else:  # a flip in what gzip does not check, such as its time stamp, alters nothing
            accepted += not same(folder, str(world.model))
            shutil.rmtree(cache)
            cache.mkdir()
        poisoned += len(os.listdir(cache))
    site.give("/m.tar.gz", data)
    return Row(
        f"model archive cut at {len(cuts)} places, {len(flips)} times one bit flipped",
        f"{accepted} accepted, {poisoned} poisoned",
        not (accepted or poisoned) and same(handles.resolve(url), str(world.model)),
    )


def same(one: str, other: str) -> bool:
    """Whether two model directories hold the same files."""
    trees = [
        {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}
        for root in (one, other)
    ]
    return trees[0] == trees[1]


FETCH = "import sys; from models.handles import resolve; print(resolve(sys.argv[1]))"


def killed(world: World, site: servers.Site, cache: Path, data: bytes) -> Row:
    """kill -9 and SIGTERM in mid-download, at a random byte; what the next one takes."""
    wrong, slowest = 0, 0.0
    times = max(2, world.times // 2)
    for turn in range(times):
        shutil.rmtree(cache, ignore_errors=True)
        site.halfway.clear()
        at = world.random.randrange(1, len(data))
        url = site.give("/k.tar.gz", data, sent=at, stall=True)
        process = subprocess.Popen([sys.executable, "-c", FETCH, url], cwd=ROOT)
        site.halfway.wait(60)
        time.sleep(world.random.uniform(0, 0.1))
        number = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
        process.send_signal(number)
        wrong += process.wait() != -number  # it was done before
        site.give("/k.tar.gz", data)
        begun = time.monotonic()
        again = subprocess.run(
            [sys.executable, "-c", FETCH, url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        slowest = max(slowest, time.monotonic() - begun)
        wrong += again.returncode != 0 or not same(again.stdout.strip(), str(world.model))
    return Row(
        f"model fetch ended by kill -9 or SIGTERM at {times} random bytes, then fetched again",
        f"{wrong} poisoned, the next fetch took {slowest:.1f} s at most",
        not wrong and slowest < _SOON,
    )


def without_network(world: World) -> Row:
    """A run in a network namespace of its own, whose only way out counts what is sent by it."""
    name = "no network: packets that a local run sends, loopback apart"
    folder = write_files(world.fresh("in"), 20)
    output = world.fresh("out")
    job = words({"input": folder, "model": world.model, "output": output})
    probe = [sys.executable, "-c", "import socket; socket.getaddrinfo('example.org', 80)"]
    commands = [probe, [sys.executable, "-m", "pipeline.extract", *job]]
    told = []
    for command in commands:
        done = subprocess.run(
            ["unshare", "-n", "sh", "-c", _VETH, "sh", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        packets = [line for line in done.stderr.splitlines() if line.startswith("packets ")]
        if not packets:
            return Row(name, f"no namespace can be made: {done.stderr[-200:]}", False)
        told.append((done.returncode, int(packets[0].split()[1])))
    (_, seen), (code, sent) = told
    return Row(
        name,
        f"{sent}, exit {code} (a look-up of example.org there: {seen})",
        not code and not sent and seen > 0,
    )
