"""Every command that writes, on the small model: what it is called, and its words for a place to write to.

Run as a program, ``python -m tests.support.every_command FOLDER`` makes one result of each command in a folder and says
how each ended, as JSON; ``--refused FOLDER`` calls each for places that take no files, without the rights of root.
"""

from __future__ import annotations

import json
import resource
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Bytes that a file may have where the disk is said to be full, and which commands are called then: no file can be
#: written, or none of the large ones.
FULL = {64: None, 20_000: ("convert", "calibrate", "train", "train by gradient", "moments")}
#: What is not called where the disk is full: runs that processes of their own make, and more of what `stitch` does.
SLOW = ("sweep", "generate", "communicate")


def prepared(folder: Path) -> list[tuple[str, ...]]:
    """Commands that make in a folder what the others need: models, a store of them, a run.

    Args:
        folder: Writable.
    """
    from featstore.demo.sample import sample_texts

    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in sample_texts()[:30]))
    models = (f"--model=a={folder}/models/small", f"--model=b={folder}/models/small-untrained")
    corpus = ("--dataset", f"jsonl:{text}", "--max-document-bytes", "300", "--layers", "50%", "--device", "cpu")
    store = f"{folder}/s.zarr"
    return [
        ("featstore", "calibrate", "--small", "--out", f"{folder}/models"),
        ("featstore", "extract", *models, *corpus, "--store", store),
        ("align", "train", "--store", store, "--type", "procrustes", "--out", f"{folder}/run"),
    ]


def adding(store: Path) -> dict[str, tuple[str, ...]]:
    """Commands that write into a store that is there.

    Args:
        store: The store.
    """
    return {
        "pair": ("featstore", "pair", str(store), "--policy", "word"),
        "moments": ("featstore", "moments", str(store)),
        "extract layers": ("featstore", "extract", "--store", str(store), "--layers", "0%,50%", "--device", "cpu"),
    }


def writing(folder: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """Commands that write into a place of their own.

    Args:
        folder: Holds what :func:`prepared` makes.
        out: Results go below it, by the name of the command.
    """
    store, run = f"{folder}/s.zarr", f"{folder}/run"
    models = (f"--model=a={folder}/models/small", f"--model=b={folder}/models/small-untrained")
    corpus = ("--dataset", f"jsonl:{folder}/text.jsonl", "--max-document-bytes", "300", "--layers", "50%")
    loop = ("--epochs", "1", "--tracker", "tensorboard", "--rank", "2")
    return {
        "extract": ("featstore", "extract", *models, *corpus, "--device", "cpu", "--store", f"{out}/extract"),
        "convert": ("featstore", "convert", store, "--format", "float16", "--out", f"{out}/convert"),
        "calibrate": ("featstore", "calibrate", "--small", "--out", f"{out}/calibrate"),
        "train": ("align", "train", "--store", store, "--type", "procrustes", "--out", f"{out}/train"),
        "train by gradient": ("align", "train", "--store", store, "--type", "lora", *loop, "--out", f"{out}/lora"),
        "cka": ("align", "cka", "--store", store, "--out", f"{out}/cka"),
        "sweep": ("align", "sweep", "--store", store, "--types", "procrustes", "--out", f"{out}/sweep"),
        "stitch": (
            *("evaluate", "stitch", "--store", store, "--adapter", run, "--max-tokens", "60", "--device", "cpu"),
            *("--out", f"{out}/stitch"),
        ),
        "generate": (
            *("evaluate", "generate", "--adapter", run, "--max-new-tokens", "2", "--device", "cpu"),
            *("--out", f"{out}/generate"),
        ),
        "communicate": (
            *("evaluate", "communicate", "--adapter", run, "--examples", "2", "--device", "cpu"),
            *("--max-new-tokens", "2", "--out", f"{out}/communicate"),
        ),
        "report": ("evaluate", "report", run, "--out", f"{out}/report.html"),
    }


def programmes(folder: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """Commands that run others, for many minutes where nothing stops them.

    Args:
        folder: Holds what :func:`prepared` makes.
        out: Results go below it.
    """
    return {
        "demo": ("featstore", "demo", "--out", f"{out}/demo", "--cache", f"{folder}/models"),
        "demo's cache": ("featstore", "demo", "--out", f"{folder}/demo", "--cache", f"{out}/cache"),
        "reproduce": ("evaluate", "reproduce", "--store", f"{folder}/s.zarr", "--out", f"{out}/reproduce"),
    }


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can get larger; what the system says then is not that the disk is full, but it says it at the same calls.

    Args:
        limit: Bytes.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def ended(*command: str) -> dict[str, object]:
    """How a command ends, errors that escape it among that.

    Args:
        command: Its words.
    """
    import traceback

    from tests.support.commands import called

    try:
        outcome = called(*command)
    except BaseException:  # noqa: BLE001 - whatever a user would see as a traceback
        return {"code": 1, "err": traceback.format_exc()}
    return {"code": outcome.code, "err": outcome.err}


def main() -> None:
    """Say as JSON how each command ended, by its name and place."""
    *flags, typed = sys.argv[1:]
    folder = Path(typed)
    found: dict[str, object] = {}
    if not flags:
        for command in prepared(folder):
            found[" ".join(command[:2])] = ended(*command)
        out = folder / "out"
        shutil.copytree(folder / "s.zarr", folder / "added.zarr")
        for name, command in {**writing(folder, out), **adding(folder / "added.zarr")}.items():
            if name != "sweep":
                found[name] = ended(*command)
    else:
        from tests.support.unprivileged import give_up_rights

        give_up_rights()
        closed = folder / "closed"
        closed.mkdir()
        closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
        (folder / "file").touch()
        places = {"read only": closed, "below a file": folder / "file", "no place": Path("/proc")}
        places["too long"] = folder / ("x" * 300)
        for place, out in places.items():
            for name, command in {**writing(folder, out), **programmes(folder, out)}.items():
                found[f"{name}: {place}"] = ended(*command)
        for path in (folder / "s.zarr").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (folder / "s.zarr").chmod(0o555)
        for name, command in adding(folder / "s.zarr").items():
            found[f"{name}: read only"] = ended(*command)
        (folder / "s.zarr").chmod(0o755)
        for path in (folder / "s.zarr").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for limit, names in FULL.items():
            for name, command in {**adding(folder / "s.zarr"), **writing(folder, folder / f"full-{limit}")}.items():
                if name in names if names else name not in SLOW:
                    with full_disk(limit):
                        found[f"{name}: full after {limit}"] = ended(*command)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
