"""Which sockets a command listens on: the process and all below it are watched while it runs.

Two witnesses: the kernel's tables are read again and again, and every Python process of the command notes by itself
what it binds. The first sees libraries that are not Python, the second what is open for a moment only.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import ROOT
from tests.support.commands import command_environment

#: Loaded by every interpreter of the command, before anything else.
_NOTES = """
import os, sys

def note(event, args, to=os.environ["NOTED_SOCKETS"]):
    if event == "socket.bind":
        with open(to, "a") as file:
            file.write(f"{args[1]!r}\\n")

sys.addaudithook(note)
"""
_TCP_LISTENS, _UNIX_ACCEPTS = "0A", 0x10000


@dataclass
class Watched:
    """A command that has ended, and the sockets it had.

    Attributes:
        code: Exit code.
        out: Its stdout.
        err: Its stderr.
        looks: How often the kernel's tables were read.
        processes: The most processes it consisted of at a time.
        listening: What listened, as ``tcp 127.0.0.1:80`` or ``unix /path``.
        bound: Addresses that its Python processes bound.
    """

    code: int
    out: str
    err: str
    looks: int = 0
    processes: int = 0
    listening: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)


def watched(folder: Path, command: Sequence[object], *, seconds: float = 300.0) -> Watched:
    """Run a command and watch its sockets until it ends.

    Args:
        folder: An empty directory for notes and output.
        command: Its words.
        seconds: When it is killed.
    """
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(_NOTES)
    noted = folder / "bound"
    noted.touch()
    # pytest's own path finds the packages, wherever this runs.
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    environment = command_environment(PYTHONPATH=path, NOTED_SOCKETS=str(noted))
    seen = Watched(-1, "", "")
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen([*map(str, command)], env=environment, stdout=out, stderr=err)
        try:
            end = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < end:
                family = tree_of(process.pid)
                seen.listening |= listening(family)
                seen.processes = max(seen.processes, len(family))
                seen.looks += 1
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    seen.code, seen.out, seen.err = process.returncode, (folder / "out").read_text(), (folder / "err").read_text()
    seen.bound = set(noted.read_text().splitlines())
    return seen


def tree_of(root: int) -> list[int]:
    """A process and all below it, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def listening(processes: Sequence[int]) -> set[str]:
    """What processes listen on, over TCP or as a Unix socket; and every bound UDP socket, which needs no listening."""
    inodes = {inode for pid in processes for inode in _sockets(pid)}
    return {name for inode, name in _open_to_others() if inode in inodes}


def _sockets(pid: int) -> Iterator[str]:
    try:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            kind, _, inode = str(handle.readlink()).partition(":")
            if kind == "socket":
                yield inode.strip("[]")
    except OSError:
        return


def _open_to_others() -> Iterator[tuple[str, str]]:
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in _table(name):
            words = line.split()
            if words[3] == _TCP_LISTENS or name.startswith("udp"):
                yield words[9], f"{name} {_address(words[1])}"
    for line in _table("unix"):
        words = line.split()
        if int(words[3], 16) & _UNIX_ACCEPTS:
            yield words[6], f"unix {words[7] if len(words) > 7 else ''}"


def _table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.exists() else []


def _address(text: str) -> str:
    host, _, port = text.partition(":")
    if len(host) == 8:
        host = ".".join(str(byte) for byte in reversed(bytes.fromhex(host)))
    return f"{host}:{int(port, 16)}"
