"""No command opens a socket to anybody: neither its own process nor any below it listens or binds, on any address."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from align.runs.train import train
from align.settings import Settings
from tests.support.commands import command_line
from tests.support.planted import plant, spectrum_rows
from tests.support.sockets import listening, watched

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel's tables of sockets are Linux's")

SMALL = ("--max-tokens", "4000", "--window-bytes", "256", "--device", "cpu")

#: Every command that computes; how many processes it is, with what it is made of in capitals.
COMMANDS = {
    "cka": ("align cka --store STORE --permutations 0 --out OUT", 1),
    "cka on processes": ("align cka --store STORE --permutations 0 --workers 2 --out OUT", 2),
    "sweep": ("align sweep --store STORE --types procrustes,lora --ranks 2 --epochs 1 --workers 2 --out OUT", 3),
    "train": ("align train --store STORE --type lora --rank 2 --epochs 1 --tracker none --device cpu --out OUT", 1),
    "extract": ("featstore extract --model a=A --model b=B --dataset TEXT --layers 0%,100% --store OUT", 1),
    "verify": ("featstore verify STORE", 1),
    "stitch": ("evaluate stitch --store TINY --adapter RUN --max-tokens 200 --device cpu --out OUT", 1),
}
#: What need not be asked every time, since nothing is behind it but what the others do.
SELDOM = COMMANDS.keys() - {"cka", "cka on processes", "sweep"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = {k: spectrum_rows(400, 8, k) for k in (0, 1)}
    y = {k: rows + 0.1 * spectrum_rows(400, 8, k + 5) for k, rows in x.items()}
    return plant(tmp_path_factory.mktemp("sockets") / "s.zarr", x, y).path


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sockets") / "run"
    train(Settings(str(tiny_store), layers="2"), out, quiet=True)
    return out


def meant(word: str, request: pytest.FixtureRequest) -> str:
    """A word of a command, or what a word in capitals stands for."""
    fixture = {"STORE": "store", "RUN": "run", "TINY": "tiny_store", "A": "tiny_llama", "B": "tiny_mistral"}
    if word == "TEXT":
        return f"jsonl:{request.getfixturevalue('short_corpus')}"
    name, equals, place = word.rpartition("=")
    return f"{name}{equals}{request.getfixturevalue(fixture[place])}" if place in fixture else word


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] if name in SELDOM else []) for name in COMMANDS]
)
def test_no_command_listens(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    line, processes = COMMANDS[name]
    command, *words = line.split()
    words = [str(tmp_path / "out") if word == "OUT" else meant(word, request) for word in words]
    more = SMALL if name == "extract" else ()
    seen = watched(tmp_path / "watched", command_line(command, *words, *more))
    assert seen.code == 0, seen.err
    assert seen.looks > 10
    assert seen.processes >= processes
    assert seen.listening == set()
    assert seen.bound == set()


CODE = """
import os, socket, subprocess, sys, time
kind = sys.argv[1]
if kind == "below":
    raise SystemExit(subprocess.call([sys.executable, sys.argv[0], "tcp"]))
family = {"unix": socket.AF_UNIX, "tcp6": socket.AF_INET6}.get(kind, socket.AF_INET)
with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as own:
    own.bind({"unix": f"\\0of-this-test-{os.getpid()}", "tcp6": ("::1", 0)}.get(kind, ("127.0.0.1", 0)))
    if kind != "udp":
        own.listen()
    time.sleep(1)
"""


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "udp", "unix", "below"])
def test_a_socket_is_seen(tmp_path: Path, kind: str) -> None:
    if kind == "tcp6" and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    (tmp_path / "script.py").write_text(CODE)
    seen = watched(tmp_path / "watched", [sys.executable, tmp_path / "script.py", kind])
    if kind == "tcp6" and "Cannot assign requested address" in seen.err:
        pytest.skip("this machine has no IPv6")
    assert seen.code == 0, seen.err
    assert len(seen.listening) == 1
    assert seen.listening.pop().startswith("tcp " if kind == "below" else kind)
    assert len(seen.bound) == 1


def test_other_processes_are_not_ours() -> None:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        assert listening([os.getpid()]) >= {f"tcp 127.0.0.1:{own.getsockname()[1]}"}
        assert listening([1 << 30]) == set()
