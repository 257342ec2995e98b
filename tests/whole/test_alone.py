"""`featstore verify` reads the store and nothing else: no model code, no other file, no socket."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.commands import command_environment

#: Runs the command; every file that is opened, every socket and every module that was imported goes to a file.
WATCHED = """
import json, os, sys
opened, sockets = set(), []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.add(os.path.abspath(os.fsdecode(arguments[0])))
    elif event.startswith("socket."):
        sockets.append(event)
sys.addaudithook(watch)
from featstore.cli import main
sys.argv = ["featstore", *sys.argv[2:]]
try:
    main()
except SystemExit as stop:
    code = stop.code
else:
    code = 0
seen = {"code": code, "opened": sorted(opened), "sockets": sockets, "modules": sorted(sys.modules)}
sys.stdout.flush()
open(os.environ["SEEN"], "w").write(json.dumps(seen))
"""
MODEL_CODE = ("torch", "transformers", "huggingface_hub", "tokenizers", "peft", "safetensors", "datasets")


def watched(tmp_path: Path, *words: object) -> dict:
    seen = tmp_path / "seen.json"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "-", *map(str, words)],
        env=command_environment(SEEN=str(seen), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(seen.read_text("utf-8")), "out": done.stdout}


def test_verify_reads_the_store_alone(tiny_store: Path, tmp_path: Path) -> None:
    seen = watched(tmp_path, "verify", tiny_store)
    assert seen["code"] == 0
    assert "no damage" in seen["out"]
    assert "give --retokenise or --reextract N" in seen["out"]
    assert seen["sockets"] == []
    loaded = {name.partition(".")[0] for name in seen["modules"]}
    assert loaded.isdisjoint(MODEL_CODE)
    assert not [name for name in seen["modules"] if name.startswith("featstore.extraction.")]
    code = (str(ROOT), sys.prefix, sys.base_prefix, "/dev/", "/proc/", "/sys/", "/etc/", "/usr/")
    other = [path for path in seen["opened"] if not path.startswith((*code, str(tiny_store)))]
    assert other == []
    inside = [path for path in seen["opened"] if path.startswith(str(tiny_store))]
    assert len(inside) > 20  # the watch sees what is read


def test_the_watch_sees_a_model(tiny_store: Path, tiny_llama: Path, tmp_path: Path) -> None:
    seen = watched(tmp_path, "verify", tiny_store, "--retokenise")
    assert "transformers" in seen["modules"]
    assert [path for path in seen["opened"] if path.startswith(str(tiny_llama))]
    assert seen["sockets"] == []
