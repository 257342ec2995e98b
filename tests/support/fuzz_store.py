"""A small store with every kind of document, these mutated and sealed again, and what the commands make of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.runs.train import train
from align.scoring.moments import layer_similarity
from align.settings import Settings
from align.similarity.compare import Comparison
from featstore import open_store
from featstore.errors import FeatstoreError
from featstore.runtime.provenance import digest
from featstore.store.format.documents import consolidated
from featstore.store.inspect.summary import (
    describe,
    describe_states,
    describe_window,
    states_summary,
    summary,
    window_table,
)
from featstore.store.inspect.verify import verify_store
from featstore.store.moments.stored import StoredMoments
from featstore.store.moments.writing import add_moments
from featstore.store.write.index import add_pairs, write_sinks
from featstore.store.write.writer import StoreWriter, exclusive
from tests.support.fuzz import mutations
from tests.support.store_fixtures import MODELS, Recipe, write_quickly

#: Documents enough for a fit and for splits, and no more.
SMALL = Recipe(documents=16, document_bytes=150, width=4, shard_rows=256, layers=(2,), roles=(2, 3))
SHARDS = "manifest/metadata.json"


def small_store(path: Path, recipe: Recipe = SMALL) -> Path:
    """A store with roles, moments, pairs of two policies, and all attributes that an extraction writes.

    Args:
        path: Where it goes.
        recipe: What it holds.
    """
    write_quickly(path, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        with exclusive(path):
            writer, store = StoreWriter(path), open_store(path)
            for name in MODELS:
                writer.group(f"models/{name}", {"featstore": store.model(name).attributes | _model(name, recipe)})
            writer.seal({"featstore": _root(store.attributes)})
            for name in MODELS:
                write_sinks(writer, name)
            writer.seal({"featstore": _root(store.attributes)})
        for policy in ("end", "word"):
            add_pairs(path, policy)
        add_moments(path, quiet=True)
    return path


def _model(name: str, recipe: Recipe) -> dict[str, Any]:
    """What an extraction records of a model besides the shape of its states."""
    sha256 = f"{zlib.crc32(name.encode()):064x}"
    versions = {"numpy": "2.4.6", "torch": "2.13.0", "transformers": "5.23.0", "zarr": "3.1.6"}
    return {
        "attention": "sdpa",
        "batch_tokens": 8192,
        "byte_ends": "bytes",
        "compute_dtype": "float32",
        "config_sha256": sha256,
        "device_type": "cpu",
        "family": "llama",
        "format": recipe.form,
        "layout": recipe.layout,
        "reference": f"models-that-are-not-here/{name}",
        "revision": None,
        "shard_rows": recipe.shard_rows,
        "site_convention": "layer k = residual stream after k blocks",
        "start_token": {"id": 0, "text": "<s>"} if name == "b" else None,
        "states": "rows",
        "tokenizer_sha256": sha256,
        "tokens_sha256": sha256,
        "versions": versions,
        "vocabulary": 1000,
        "weights_fingerprint": f"blake3:{sha256}",
        "weights_sample": sha256,
    }


def _root(attributes: dict[str, Any]) -> dict[str, Any]:
    """What an extraction records of the text and the plan besides counts."""
    text = {
        "control_tokens": "text",
        "form": "text",
        "max_document_bytes": 400,
        "max_documents": None,
        "max_tokens": 1_000_000,
        "normalise": "none",
        "seed": 0,
        "sha256": "0" * 64,
        "source": {"field": "text", "kind": "jsonl", "location": "text.jsonl", "split": "train"},
    }
    return attributes | {
        "complete": True,
        "corpus": attributes["corpus"] | text,
        "moments": False,
        "plan": "1" * 64,
        "segments": [],
        "site_convention": "layer k = residual stream after k blocks",
        "split": attributes["split"] | {"rule": "by hash"},
    }


def documents_of(path: Path) -> list[str]:
    """Every JSON document of a store, sorted.

    Args:
        path: The store.
    """
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*.json"))


@contextlib.contextmanager
def changed(path: Path, name: str, text: bytes) -> Iterator[None]:
    """A store with another document, every checksum of which is right: what is judged is what it says.

    Args:
        path: A sealed store; as it was afterwards.
        name: The document.
        text: Its new content.
    """
    before = {each: (path / each).read_bytes() for each in {name, "zarr.json", SHARDS}}
    try:
        (path / name).write_bytes(text)
        reseal(path, name)
        yield
    finally:
        for each, data in before.items():
            (path / each).write_bytes(data)


def reseal(path: Path, name: str) -> None:
    """Compute again every checksum and copy that depends on a document, as far as it can be parsed.

    Args:
        path: The store.
        name: The document that was changed.
    """
    if name == SHARDS:
        return
    sealed, data = json.loads((path / SHARDS).read_bytes()), (path / name).read_bytes()
    # A seal without an index has readers take in the entries themselves, which are what is mutated here.
    sealed.pop("index", None)
    if name.startswith("manifest/"):
        unit = name.removeprefix("manifest/").removesuffix(".json")
        sealed["units"][unit] = f"{zlib.crc32(data):08x}"
    else:
        sealed["files"][name] = _record(data)
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError, IndexError):
            _seal_root(path, name, data, sealed)
    (path / SHARDS).write_text(json.dumps(sealed, indent=1, sort_keys=True))


def _seal_root(path: Path, name: str, data: bytes, sealed: dict[str, Any]) -> None:
    document = json.loads(data)
    if name == "zarr.json":
        sealed["attributes"] = digest({"featstore": document["attributes"]["featstore"]})
        return
    root = json.loads((path / "zarr.json").read_bytes())
    [held] = consolidated({name.removesuffix("/zarr.json"): document})["metadata"].items() or [(None, None)]
    root["consolidated_metadata"]["metadata"][held[0]] = held[1]
    text = json.dumps(root, indent=1, sort_keys=True).encode()
    (path / "zarr.json").write_bytes(text)
    sealed["files"]["zarr.json"] = _record(text)


def _record(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


# What the commands make of it -----------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """What became of a store.

    Attributes:
        verify: Lines of damage, or of the error that ended it; empty where there is none.
        accepted: Commands that went through without a word about what verify refuses.
        crashed: Tracebacks by command.
    """

    verify: list[str]
    accepted: list[str]
    crashed: dict[str, str]


def judge(path: Path, scratch: Path, *, figures: bool = True) -> Judgement:
    """Open, describe, verify, fit and compare a store in this process, without the seconds that a command takes.

    Args:
        path: The store.
        scratch: A directory for results, which are removed.
        figures: Whether to fit and compare also where verify finds nothing.
    """
    crashed: dict[str, str] = {}
    accepted: list[str] = []

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            found = work()
        except FeatstoreError as error:
            line = str(error)
            return line or type(error).__name__
        except Exception as error:  # noqa: BLE001 - what is not ours is what is looked for
            crashed[name] = "".join(traceback.format_exception(error)[-3:])
            return "a traceback"
        accepted.append(name)
        return found

    found = attempt("verify", lambda: verify_store(path, quiet=True)["damage"])
    damage = found if isinstance(found, list) else [found]
    if damage and "verify" in accepted:
        accepted.remove("verify")
    attempt("open", lambda: open_store(path))
    if "open" in accepted:
        attempt("info", lambda: _info(path))
        attempt("inspect", lambda: describe_window(window_table(open_store(path), 0, 24)))
        if damage or figures:
            shutil.rmtree(scratch, ignore_errors=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda _: None)
                attempt("train", lambda: train(Settings(store=str(path)), scratch / "run", quiet=True))
            shutil.rmtree(scratch, ignore_errors=True)
            attempt("cka", lambda: _cka(path))
    return Judgement(damage, accepted, crashed)


def _info(path: Path) -> str:
    store = open_store(path)
    states = states_summary(store, quiet=True)
    result = summary(store) | {"states": states}
    return json.dumps(result, allow_nan=False) + describe(result) + describe_states(states)


def _cka(path: Path) -> None:
    """Over a sample of rows, and from moments; without a scheduler."""
    store = open_store(path)
    models = (store.models[0], store.models[-1])
    layers = {name: store.model(name).layers for name in models}
    Comparison(path, models=models, layers=layers, kernel="rbf", permutations=0, max_rows=64, quiet=True).run(None)
    stored = StoredMoments(store, *models)
    sites = [(name, layer) for name, own in layers.items() for layer in own]
    if stored.covers([(x, y) for x in sites for y in sites]):
        layer_similarity(stored, sites, "biased")


def fuzz(
    path: Path, scratch: Path, seed: int, count: int, *, figures: bool = True
) -> Iterator[tuple[str, str, Judgement]]:
    """Mutations of every document of a store in turn, and what became of the store.

    Args:
        path: The store; as it was afterwards.
        scratch: A directory for results.
        seed: Decides everything.
        count: Mutated documents in all.
        figures: Whether to fit and compare also where verify finds nothing.

    Yields:
        The document, what was changed in it, and the judgement.
    """
    rng = random.Random(seed)
    kinds: dict[str, list[str]] = {}
    for name in documents_of(path):
        kinds.setdefault(kind_of(name), []).append(name)
    order = sorted(kinds)
    rng.shuffle(order)
    share = np.bincount(np.arange(count) % len(order), minlength=len(order)).tolist()
    for kind, n in zip(order, share, strict=True):
        name = rng.choice(kinds[kind])
        document = json.loads((path / name).read_bytes())
        # The copies of other documents are other readers' business, and would hide what the root itself says.
        document.pop("consolidated_metadata", None)
        for described, text in mutations(document, rng, n):
            with changed(path, name, text):
                yield name, described, judge(path, scratch, figures=figures)


def kind_of(name: str) -> str:
    """What a document is, whichever model, layer, split or shard it is of: every kind gets as many mutations.

    Args:
        name: Path within the store.
    """
    parts = name.split("/")
    if "moments" in parts:
        after = parts[parts.index("moments") :]
        return "/".join(
            [*parts[: parts.index("moments")], *("*" if 0 < at < 4 else part for at, part in enumerate(after))]
        )
    return "/".join("*" if part in MODELS or part.isdecimal() else part for part in parts)
