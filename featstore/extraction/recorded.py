"""What an existing store says about how it was made, and what a new command therefore means.

Flags that were not typed are taken from the store: the same command, a shorter one, another layer, another model or a
larger budget all go through here, and whatever contradicts the store is named before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import CorruptDataError, StoreFormatError, StoreStateError
from featstore.extraction.named import reference_of
from featstore.extraction.settings import Settings
from featstore.models.attention import parse_attention
from featstore.models.tokenizers import held_control_tokens
from featstore.models.verdict import Verdict
from featstore.store.format.version import PACKED_VERSION
from featstore.store.read.files import LocalFiles
from featstore.store.read.records import TOKEN_COLUMNS, StoredModel
from featstore.store.read.store import Store, open_files
from featstore.store.read.structure import own_attributes
from featstore.store.write.writer import StoreWriter
from featstore.text.chat import DATE
from featstore.text.plan import PlannedCorpus, PlannedModel
from featstore.text.sources import Source

#: Settings that decide which text is read.
TEXT_FIELDS = (
    "dataset",
    "text_field",
    "normalise",
    "control_tokens",
    "max_tokens",
    "max_documents",
    "max_document_bytes",
    "window_bytes",
    "seed",
    "generate",
    "generate_with",
    "temperature",
    "top_p",
)
#: How text was generated: what is not typed is the store's, and what is typed has to be.
_GENERATION = ("generate", "generate_with", "temperature", "top_p")
#: Model attributes that may differ between an extraction and a later addition to it.
_MAY_DIFFER = ("versions", "device_type")
#: Model attributes that say of the weights what their fingerprint decides; older stores lack them.
_TOLD_BY_WEIGHTS = ("quantization", "adapter", "verified")
#: Model attributes that say of the tokenizer what its hash decides; older stores lack them.
_TOLD_BY_TOKENIZER = ("start_token", "start_token_asked")


@dataclass(frozen=True)
class Recorded:
    """A store's own account of how it was made.

    Attributes:
        path: The store.
        store: It, open for reading.
        models: Attributes by model, in store order; an unfinished store may lack some.
    """

    path: Path
    store: Store
    models: dict[str, dict[str, Any]]

    @property
    def root(self) -> dict[str, Any]:
        """The root's attributes."""
        return self.store.attributes

    @property
    def complete(self) -> bool:
        """Whether the store's last extraction was finished."""
        return bool(self.root.get("complete"))

    @property
    def normalise(self) -> str:
        """The form that the text was brought into when it was read; older stores have it as it was.

        Raises:
            CorruptDataError: No such form.
        """
        form = self.root["corpus"].get("normalise", "none")
        if form not in ("none", "nfc"):
            raise CorruptDataError(
                f"{self.path}/zarr.json: corpus.normalise is {form!r}, neither none nor nfc; restore it"
            )
        return str(form)

    @property
    def date(self) -> str:
        """The day that chat templates were told it is."""
        return str(self.root["corpus"].get("date", DATE))

    @property
    def segments(self) -> tuple[int, ...]:
        """Window counts at which earlier plans ended."""
        return tuple(self.root.get("segments", ()))

    def begun(self, name: str) -> bool:
        """Whether the store has states of a model, or what was measured of them.

        What a command that failed before any of this has written is its wish: the next command may wish otherwise.

        Args:
            name: Model.
        """
        tokens, below = f"models/{name}/tokens", f"models/{name}/"
        units = StoreWriter(self.path).unit_names()
        return self.complete or any(unit.startswith(below) and unit != tokens for unit in units)

    @property
    def empty(self) -> bool:
        """Whether the store has no states at all, of no model."""
        return not any(self.begun(name) for name in self.models)

    def settings(self) -> dict[str, Any]:
        """The settings that were used, by field name, as far as the store tells."""
        corpus = self.root["corpus"]
        source = Source(**corpus["source"])
        found: dict[str, Any] = {
            "dataset": source.text,
            "text_field": source.field,
            "normalise": self.normalise,
            "control_tokens": held_control_tokens(corpus),
            **{name: corpus[name] for name in ("max_tokens", "max_documents", "max_document_bytes", "seed")},
            "window_bytes": self.root["window_bytes"],
            **_generation(corpus.get("generate")),
            "sink_threshold": self.root["mask"]["sink_threshold"],
            "moments": "add" if self.root.get("moments") else "none",
        }
        for attributes in self.models.values():
            names = ("batch_tokens", "shard_rows", "layout", "layer_0")
            found |= {name: attributes[name] for name in names}
            found |= {"form": attributes["format"], "dtype": attributes["compute_dtype"]}
            if attributes["states"] == "moments":
                found["moments"] = "only"
        return found

    def attention(self) -> dict[str, str]:
        """The attention implementation that each model ran.

        Raises:
            AttentionError: The store names one that is not in the list.
        """
        return {name: attention_of(attributes, self.path, name) for name, attributes in self.models.items()}

    def verified(self, name: str) -> Verdict | None:
        """What was found out about a model when it was stored, or None where the store does not say.

        Args:
            name: Model.

        Raises:
            CorruptDataError: The verdict is damaged.
        """
        held = self.models.get(name, {}).get("verified")
        return Verdict.parse(held, f"{self.path}/models/{name}/zarr.json") if held and self.begun(name) else None

    def references(self) -> dict[str, str]:
        """``--model`` values by model."""
        return {name: reference_of({"reference": a["reference"], **a}, name) for name, a in self.models.items()}

    def text(self) -> tuple[PlannedCorpus, dict[str, PlannedModel]] | None:
        """The committed text and token tables; None before they are, or while they are being replaced.

        Raises:
            CorruptDataError: They are damaged.
        """
        try:
            return self._text()
        except CorruptDataError:
            if self.complete:
                raise
            return None  # stopped while the text was being written, or replaced by a longer one

    def _text(self) -> tuple[PlannedCorpus, dict[str, PlannedModel]] | None:
        writer = StoreWriter(self.path)
        if not writer.has("corpus"):
            return None
        held = self.store.corpus
        planned = PlannedCorpus(**vars(held))
        if planned.hash != self.root["corpus"]["sha256"]:
            return None  # stopped on the way from a shorter text to a longer one
        tables = {}
        for name in self.models:
            if writer.has(f"models/{name}/tokens"):
                columns = self.store.columns(name, *TOKEN_COLUMNS)
                counts = np.bincount(columns["window"], minlength=len(held.window_document))
                starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
                rest = (columns[name] for name in ("byte_end", "special", "exact", "role"))
                table = PlannedModel(starts, columns["id"], *rest)
                if table.hash == self.models[name]["tokens_sha256"]:
                    tables[name] = table
        return planned, tables


def attention_of(attributes: Mapping[str, Any], path: Path | str, name: str) -> str:
    """The attention implementation that a store says a model ran.

    Args:
        attributes: Of the model.
        path: The store.
        name: The model.

    Raises:
        AttentionError: It is not in the list.
    """
    return parse_attention(attributes.get("attention"), f"{path}/models/{name}/zarr.json")


def read_recorded(path: Path) -> Recorded | None:
    """Read what a store says about itself, or None where there is no store yet.

    Args:
        path: Value of ``--store``.

    Raises:
        StoreFormatError: Something else is there.
        StoreStateError: A store of an older format version, to which this one does not add.
        CorruptDataError: The store's metadata is damaged.
    """
    taken = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if taken.exists() and not taken.is_dir():
        below = "" if taken == path else f" lies below {taken}, which"
        raise StoreFormatError(f"--store {path}{below} is a file; choose another path")
    document = path / "zarr.json"
    if not document.exists():
        strangers = [p.name for p in path.iterdir() if not p.name.startswith(".")] if path.is_dir() else []
        if strangers and strangers != ["manifest"]:
            raise StoreFormatError(f"--store {path} exists and is not a feature store; choose another path")
        return None
    store = open_files(LocalFiles(path), allow_incomplete=True)
    store.require_current()
    root = store.attributes
    models = {}
    for name in root["models"]:
        group = path / "models" / name / "zarr.json"
        if group.is_file():
            own = own_attributes(store.document(f"models/{name}"))
            models[name] = StoredModel.parse(name, own, str(group)).attributes
    return Recorded(path, store, models)


def inherit(settings: Settings, recorded: Recorded) -> Settings:
    """Complete settings from a store: what was not given is what was used.

    Args:
        settings: As given.
        recorded: The store's account.

    Raises:
        CorruptDataError: The account lacks something.
        StoreStateError: The text is to be read in another Unicode form than the store's, or answered otherwise.
    """
    try:
        used, references = recorded.settings(), recorded.references()
    except (KeyError, TypeError) as error:
        raise CorruptDataError(f"{recorded.path}/zarr.json lacks {error}; restore it or extract again") from error
    changes = {
        field.name: used[field.name]
        for field in fields(settings)
        if field.name in used and not settings.was_given(field.name)
    }
    wish = settings.normalise if settings.was_given("normalise") else "auto"
    if wish == "auto":
        changes["normalise"] = recorded.normalise  # what suits a model that joins later does not change the text
    elif wish != recorded.normalise and not recorded.empty:
        raise StoreStateError(
            f"{recorded.path} holds text that was read with --normalise {recorded.normalise}, not {wish}; "
            "leave --normalise out, or choose another --store"
        )
    if not recorded.empty:
        _refuse_other_answers(settings, recorded, used)
    if not settings.was_given("model"):
        unsaid = [name for name in recorded.root["models"] if name not in references]
        if unsaid:
            raise StoreStateError(
                f"{recorded.path} was stopped before it said what {', '.join(unsaid)} is; run the command that began "
                "it again, with its --model values"
            )
        if references:
            changes["model"] = tuple(references.values())
    return replace(settings, **changes)


def _generation(entry: dict[str, Any] | None) -> dict[str, Any]:
    """Settings from ``corpus.generate``; stores without it hold text that nobody answered."""
    if entry is None:
        return {"generate": 0, "generate_with": (), "temperature": 0.0, "top_p": 1.0}
    chosen = {"generate": entry["tokens"], "generate_with": tuple(entry["with"])}
    return {**chosen, "temperature": entry["temperature"], "top_p": entry["top_p"]}


def _refuse_other_answers(settings: Settings, recorded: Recorded, used: dict[str, Any]) -> None:
    for name in _GENERATION:
        wish, held = getattr(settings, name), used[name]
        same = set(wish) == set(held) if name == "generate_with" else wish == held
        if settings.was_given(name) and not same:
            flag = f"--{name.replace('_', '-')}"
            shown = [",".join(value) if isinstance(value, tuple) else f"{value:g}" for value in (held, wish)]
            text = f"generated with {flag} {shown[0]}, not {shown[1]}" if used["generate"] else "not generated"
            raise StoreStateError(
                f"{recorded.path} holds text that was {text}; leave {flag} out, or choose another --store"
            )


def _without_budgets(value: Any) -> Any:
    """An attribute without the budgets: where a larger one finds no more text, the text is the same."""
    return {k: v for k, v in value.items() if not k.startswith("max_")} if isinstance(value, dict) else value


def _text_of(root: dict[str, Any]) -> dict[str, Any]:
    """Root attributes, with what older stores do not say of the text."""
    held = root.get("corpus")
    if not isinstance(held, dict):
        return root
    unsaid = {"normalise": "none", "form": "text", "control_tokens": held_control_tokens(held)}
    return {**root, "corpus": unsaid | held}


def _version_told_by_moments(root: Mapping[str, Any]) -> set[str]:
    """Packed moments raise the format version of a store, and nothing else of it."""
    return {"format_version"} if root.get("format_version") == PACKED_VERSION else set()


def refuse_contradictions(recorded: Recorded, root: dict[str, Any], models: dict[str, dict[str, Any]]) -> None:
    """Refuse a command that does not fit the states in the store; where there are none, every command does.

    Args:
        recorded: The store's account.
        root: Root attributes that the command would write.
        models: Model attributes that it would write.

    Raises:
        StoreStateError: The message names every setting that differs.
    """
    growing = root["plan"] != recorded.root["plan"]
    if recorded.empty:
        return
    recorded_root, root = _text_of(recorded.root), _text_of(root)
    free = {"complete", "models", "moments", *_version_told_by_moments(recorded_root)} | (
        {"corpus", "split", "plan", "segments"} if growing else set()
    )
    changed = [
        key
        for key in root
        if key not in free and _without_budgets(recorded_root.get(key)) != _without_budgets(root[key])
    ]
    if growing and not recorded.complete:
        changed.append("corpus")
    # An addition may come from another machine or a newer library; a half-done extraction may not go on there.
    ignored = {"layers", "additions", *_TOLD_BY_WEIGHTS, *_TOLD_BY_TOKENIZER}
    ignored |= {"rows", "tokens_sha256"} if growing else set()
    ignored |= set(_MAY_DIFFER) if recorded.complete else set()
    for name, values in models.items():
        if not recorded.begun(name):
            continue
        held = recorded.models.get(name, values)
        compared = values.keys() - ignored
        changed += [f"{name}.{key}" for key in sorted(compared) if held.get(key) != values[key]]
    if changed:
        remedy = "use the same command" if recorded.complete else "complete it with the same command first"
        raise StoreStateError(
            f"{recorded.path} was made with other settings ({', '.join(changed)}); {remedy}, or choose another --store"
        )
