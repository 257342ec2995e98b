"""What our readers make of a run directory that somebody else wrote: one mutated document at a time.

A trial writes a document's new text into a copy of what commands made, hands it to every reader of that document, and
gives back what went wrong: an exception that is no refusal of ours, or a refusal that is not one plain line.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.errors import FeatstoreError
from tests.support.commands import called
from tests.support.fuzz import Mutation, mutations

#: Words of libraries that tell a user nothing of a file.
FOREIGN = ("Input should be", "validation error", "Error('", 'Error("', "pydantic", "Traceback")

#: Readers of a document: each takes the directory of everything.
Reader = Callable[[Path], None]


@dataclass(frozen=True)
class Target:
    """A document that is mutated.

    Attributes:
        file: Where it lies below the directory of everything.
        readers: Who reads it.
        document: Its value, from the file's bytes.
        text: The file's bytes with another text in the document's place.
    """

    file: str
    readers: tuple[Reader, ...]
    document: Callable[[bytes], Any] = json.loads
    text: Callable[[bytes, bytes], bytes] = lambda old, new: new


@dataclass
class Count:
    """What became of a kind of document.

    Attributes:
        trials: Documents.
        refused: Times that a reader refused one.
        accepted: Times that a reader took one.
        wrong: What went wrong, in words.
    """

    trials: int = 0
    refused: int = 0
    accepted: int = 0
    wrong: list[str] = field(default_factory=list)


# Readers ------------------------------------------------------------------------------------------------------------


def _compare(base: Path) -> None:
    from align.sweeps.compare import compare_runs
    from align.sweeps.table import describe

    found = compare_runs([base / "run", base / "other"])
    json.dumps(found, allow_nan=False).encode()
    describe(found)


def _report(*names: str) -> Reader:
    def read(base: Path) -> None:
        from evaluate.reporting import build_report

        build_report([base / name for name in names], base).encode()

    return read


def _maps(base: Path) -> None:
    from align.maps.fitted import load_adapter
    from align.notebook.maps import Maps

    maps = Maps(load_adapter(base / "run"))
    repr(maps), maps.to_pandas(), maps._repr_html_()
    for each in maps.values():
        if each.aligner.takes_rows:
            assert np.isfinite(each.transform(np.ones((2, each.widths[0]), np.float32))).all()


def _shown(kind: str, directory: str, name: str) -> Reader:
    """A result as a notebook reads it: record, table and view."""

    def read(base: Path) -> None:
        import align.results
        import evaluate.results

        module = evaluate.results if hasattr(evaluate.results, kind) else align.results
        from featstore.runtime.records import read as read_record

        record = read_record(getattr(module, kind), base / directory / name)
        record.to_pandas()
        json.dumps(record.content(), allow_nan=False).encode()

    return read


def _command(*arguments: str) -> Reader:
    """A command that must end with 0 or 1, or with one line and 2."""

    def read(base: Path) -> None:
        from evaluate.injection import loading

        with pytest.MonkeyPatch.context() as patch:
            # All that can be wrong with a card is known by now.
            patch.setattr(loading, "_load", _stop)
            done = called(*(each.format(base=base) for each in arguments))
        if done.code == 2:
            assert done.err.count("\n") == 1, done.err
            assert done.err.isprintable() or "\n" in done.err
            raise FeatstoreError(done.err.strip())
        assert done.code in (0, 1), (done.code, done.err)

    return read


def _tokens(base: Path) -> None:
    from align.tokens.files import load_tables

    file = load_tables(base / "run")
    for pair in file.pairs:
        table = file.table(pair)
        assert np.isfinite(table.predict([0, 5, 10**6])).all()


def _settings(base: Path) -> None:
    from align.settings import check, load_settings

    check(load_settings(base / "run" / "run.yaml"))


def _resume(base: Path) -> None:
    from align.runs.train import train
    from align.settings import load_settings

    work = base / "resumed"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base / "begun", work)
    train(load_settings(work / "run.yaml"), work, resume=True, quiet=True)


def _cka_again(base: Path) -> None:
    import align

    work = base / "cka-again"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base / "cka", work)
    align.cka(base / "tiny.zarr", layers="0,2", out=work, quiet=True)


def _steps(base: Path) -> None:
    from evaluate.reproduce.programme import Step
    from evaluate.reproduce.running import Record

    record = Record(base / "programme")
    step = Step("fit", "align", ("train",), ("runs/x/metrics.json",))
    record.check(step)
    record.is_done(step)
    json.dumps(record.of(step), allow_nan=False).encode()


def _texts(name: str) -> Reader:
    def read(base: Path) -> None:
        from featstore.text.documents import documents
        from featstore.text.sources import iter_texts, parse_source

        for document in documents(iter_texts(parse_source(f"jsonl:{base / name}"))):
            assert document.text

    return read


def _task(base: Path) -> None:
    from evaluate.communication.tasks.named import make

    task = make(f"jsonl:{base / 'task.jsonl'}", 10)
    for example in task.examples:
        task.text(example).encode(), task.context_text(example).encode()
        task.is_right(example, "x")
    assert 0 <= task.chance <= 1


# Documents that are not the whole of their files ---------------------------------------------------------------------


def _head(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", data[:8])
    head: dict[str, Any] = json.loads(data[8 : 8 + size])
    return head


def _with_head(old: bytes, text: bytes) -> bytes:
    (size,) = struct.unpack("<Q", old[:8])
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + old[8 + size :]


def _metadata(name: str) -> tuple[Callable[[bytes], Any], Callable[[bytes, bytes], bytes]]:
    """A JSON document that is a string in a head's metadata."""

    def document(data: bytes) -> Any:
        return json.loads(_head(data)["__metadata__"][name])

    def text(old: bytes, new: bytes) -> bytes:
        head = _head(old)
        head["__metadata__"][name] = new.decode("utf-8", errors="replace")
        return _with_head(old, json.dumps(head).encode())

    return document, text


def _archived(data: bytes) -> Any:
    with np.load(io.BytesIO(data)) as file:
        return json.loads(file["meta"].tobytes())


def _archive(old: bytes, new: bytes) -> bytes:
    with np.load(io.BytesIO(old)) as file:
        arrays = {name: file[name] for name in file.files}
    out = io.BytesIO()
    np.savez(out, **{**arrays, "meta": np.frombuffer(new, np.uint8)})
    return out.getvalue()


def _lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def _as_lines(old: bytes, new: bytes) -> bytes:
    """A list as a line for every element; what is no list as it is."""
    try:
        value = json.loads(new)
    except (ValueError, RecursionError):
        return new.replace(b"\n", b" ")
    values = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(each).encode() + b"\n" for each in values)


def _yaml(data: bytes) -> Any:
    import yaml

    return yaml.safe_load(data)


#: Every document beside stores, and who reads it.
TARGETS: dict[str, Target] = {
    "adapter.json": Target(
        "run/adapter.json",
        (
            _maps,
            _compare,
            _report("run"),
            _command(
                "evaluate",
                "stitch",
                "--adapter",
                "{base}/run",
                "--store",
                "{base}/tiny.zarr",
                "--layers",
                "2",
                "--max-tokens",
                "50",
                "--json",
            ),
            _command("evaluate", "generate", "--adapter", "{base}/run", "--layers", "2", "--json"),
            _command("evaluate", "communicate", "--adapter", "{base}/run", "--layers", "2", "--json"),
        ),
    ),
    "adapter.safetensors": Target("run/adapter.safetensors", (_maps,), _head, _with_head),
    "tokens.safetensors": Target("run/tokens.safetensors", (_tokens,), _head, _with_head),
    "tokens.safetensors, about": Target("run/tokens.safetensors", (_tokens,), *_metadata("about")),
    "metrics.json": Target(
        "run/metrics.json",
        (
            _shown("Metrics", "run", "metrics.json"),
            _compare,
            _report("run", "other"),
            _command("align", "compare", "{base}/run", "{base}/other", "--json"),
        ),
    ),
    "documents.json": Target("run/documents.json", (_shown("Documents", "run", "documents.json"), _compare)),
    "eval_epoch_1.json": Target(
        "run/eval_epoch_1.json", (_shown("EpochRecord", "run", "eval_epoch_1.json"), _report("run"))
    ),
    "run.yaml": Target("run/run.yaml", (_settings,), _yaml),
    "log.jsonl": Target("run/log.jsonl", (_report("run"),), _lines, _as_lines),
    "sweep.json": Target(
        "sweep/sweep.json",
        (_report("sweep"), _command("evaluate", "report", "{base}/sweep", "--out", "{base}/page.html")),
    ),
    "cka.json": Target("cka/cka.json", (_shown("Similarity", "cka", "cka.json"), _report("cka", "run"))),
    "cka_documents.json": Target(
        "cka/cka_documents.json", (_shown("SimilarityDocuments", "cka", "cka_documents.json"),)
    ),
    "stitch.json": Target("run/stitch.json", (_shown("Stitched", "run", "stitch.json"), _report("run"))),
    "stitch_documents.json": Target(
        "run/stitch_documents.json", (_shown("StitchedDocuments", "run", "stitch_documents.json"),)
    ),
    "generations.json": Target(
        "run/generations.json", (_shown("Generations", "run", "generations.json"), _report("run"))
    ),
    "communicate.json": Target(
        "run/communicate.json", (_shown("Communication", "run", "communicate.json"), _report("run"))
    ),
    "steps.json": Target("programme/steps.json", (_steps,)),
    "task.jsonl": Target("task.jsonl", (_task,), _lines, _as_lines),
    "text.jsonl": Target("text.jsonl", (_texts("text.jsonl"),), _lines, _as_lines),
    "chat.jsonl": Target("chat.jsonl", (_texts("chat.jsonl"),), _lines, _as_lines),
    "state.safetensors": Target("begun/checkpoints/*/state.safetensors", (_resume,), _head, _with_head),
    "state.safetensors, progress": Target("begun/checkpoints/*/state.safetensors", (_resume,), *_metadata("progress")),
    "state.safetensors, identity": Target("begun/checkpoints/*/state.safetensors", (_resume,), *_metadata("identity")),
    "block-0000.npz": Target("cka/checkpoints/masked/block-0000.npz", (_cka_again,), _archived, _archive),
}


# Trials -------------------------------------------------------------------------------------------------------------


def build(base: Path, store: Path) -> None:
    """Everything that is mutated, made by the commands that make it.

    Args:
        base: An empty directory.
        store: The tiny store.
    """
    import align
    import evaluate
    from align.runs import rundir
    from align.runs.train import train
    from align.settings import LoopSettings, Settings
    from align.similarity import compare
    from align.sweeps.grid import cells, parse_grid
    from align.sweeps.sweep import _Record
    from evaluate.reproduce.programme import Step
    from evaluate.reproduce.running import Record

    (base / "tiny.zarr").symlink_to(store)
    settings = Settings(
        str(base / "tiny.zarr"), "lora", layers="2", loop=LoopSettings(epochs=2, rank=4, tracker="none")
    )
    train(settings, base / "run", quiet=True)
    train(Settings(settings.store, "procrustes", layers="2"), base / "other", quiet=True)
    evaluate.stitch(base / "tiny.zarr", base / "run", max_tokens=100, quiet=True)
    evaluate.generate(base / "run", ["The capital of France is"], max_new_tokens=2, quiet=True)
    evaluate.communicate(base / "run", "lookup", examples=2, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        # What an interrupted command leaves behind.
        patch.setattr(compare, "discard", lambda _: None)
        align.cka(
            base / "tiny.zarr", layers="0,2", measures="rsa", permutations=2, draws=10, out=base / "cka", quiet=True
        )
        patch.setattr(rundir, "save_adapter", _interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            train(settings, base / "begun", quiet=True)
    grid = parse_grid(types="procrustes,affine")
    wanted = cells(Settings(settings.store, layers="2"), grid)
    shutil.copytree(base / "other", base / "sweep" / wanted[0].name)
    record = _Record(settings, grid, wanted, base / "sweep")
    record.done(wanted[0], "done", 1.5)
    record.failed(wanted[1], FeatstoreError("no rows"))
    step = Step("fit", "align", ("train",), ("runs/x/metrics.json",))
    Record(base / "programme").note(step, "done", seconds=2.5)
    _lines_of(
        base / "task.jsonl",
        {"context": "The code is K7.", "question": "What is the code?", "answer": ["K7", "K 7"], "cue": "It is"},
        {"context": "Ann has a cat.", "question": "Who has a cat?", "answer": "Ann", "cluster": "pets"},
    )
    _lines_of(base / "text.jsonl", {"text": "one document", "id": 1}, {"text": "another", "id": 2})
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": [{"type": "text", "text": "Ann."}]}]
    _lines_of(base / "chat.jsonl", {"messages": said, "tools": [{"name": "look"}]}, {"messages": said[:1]})


def _stop(*_: Any, **__: Any) -> None:
    raise FeatstoreError("a model would be loaded here")


def _lines_of(path: Path, *values: Any) -> None:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def trial(base: Path, target: Target, mutation: Mutation, count: Count) -> None:
    """Hand one mutated document to its readers, and put the document back.

    Args:
        base: The directory of everything.
        target: Of which kind the document is.
        mutation: Its new text.
        count: What becomes of it is added here.
    """
    [path] = base.glob(target.file)
    before = path.read_bytes()
    count.trials += 1
    path.write_bytes(target.text(before, mutation.text))
    try:
        for reader in target.readers:
            _judge(reader, base, mutation, count)
    finally:
        path.write_bytes(before)


def _judge(reader: Reader, base: Path, mutation: Mutation, count: Count) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            reader(base)
    except FeatstoreError as error:
        count.refused += 1
        words = [foreign for foreign in FOREIGN if foreign in str(error)]
        if words or "\n" in str(error):
            count.wrong.append(f"{mutation.description}: says {str(error)[:300]!r}")
    except Exception as error:  # noqa: BLE001 - any kind is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename][-3:]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own or [where]))
        count.wrong.append(f"{mutation.description}: {type(error).__name__}: {str(error)[:150]} at {places}")
    else:
        count.accepted += 1


def trials(base: Path, name: str, seed: int, number: int) -> Count:
    """Hand some mutations of one kind of document to its readers.

    Args:
        base: The directory of everything.
        name: Key of :data:`TARGETS`.
        seed: Decides the mutations.
        number: How many.
    """
    target, count = TARGETS[name], Count()
    [path] = base.glob(target.file)
    document = target.document(path.read_bytes())
    for mutation in mutations(document, random.Random(f"{name} {seed}"), number):
        trial(base, target, mutation, count)
    return count
