"""Token tables from a store's own text and its models' tokenizers, for states that are there: no model runs.

States belong to token ids, so the ids have to come out as they are stored. Where they do not (another version of a
tokenizer, a folder that is read otherwise now) nobody can say what the states have read, and the store stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import CorpusError, FeatstoreError, ModelLoadError, OffsetError, StoreStateError
from featstore.extraction.named import references_of
from featstore.models import loading as models
from featstore.models.references import NOTHING, Allowed, parse_model
from featstore.models.tokenizers import held_control_tokens
from featstore.runtime.console import human, progress
from featstore.runtime.provenance import digest
from featstore.store.conversion.rebuild import NewTable, rebuild_store
from featstore.store.read.store import Store
from featstore.store.write.writer import adding_to
from featstore.text import tokens
from featstore.text.chat import DATE
from featstore.text.message_arrays import holds_conversations, tokenize_windows
from featstore.text.plan import PlannedCorpus, PlannedModel
from featstore.text.planning import plan_model

#: What a model's attributes say of its tokenizer, from its description.
_TOLD = ("tokenizer_sha256", "start_token", "start_token_asked")


def rebuild(
    path: Path, model: Sequence[str] = (), allowed: Allowed = NOTHING, *, quiet: bool = False
) -> dict[str, Any]:
    """Derive a store's token tables, masks, pairs and moments again; one of version 1 becomes one of this version.

    Killed, it goes on when it is called again.

    Args:
        path: The store.
        model: ``NAME=REF`` of models that are elsewhere now; their tokenizers are enough.
        allowed: Whether tokenizers are read that the store names and the user has not.
        quiet: No progress.

    Returns:
        ``store``, ``version``, and what :func:`featstore.store.conversion.rebuild.rebuild_store` reports.

    Raises:
        ModelLoadError: A tokenizer cannot be found.
        StoreStateError: A tokenizer gives other ids than those that are stored, the store is unfinished, or moments
            cannot be summed again. Nothing has been changed then.
        SpecError: A name that is not in the store.
        StrangeReferenceError: The store names a model that the user has not named.
        StoreBusyError: Another process writes to it.
    """
    with adding_to(path, rebuild=True) as writer:
        store = writer.view
        infos = _tokenizers(store, model, allowed, quiet=quiet)
        planned = PlannedCorpus(**vars(store.corpus))
        tables = {name: _table(store, planned, info, quiet=quiet) for name, info in infos.items()}
        report = rebuild_store(writer, tables, quiet=quiet)
        version = (writer.attributes() or {})["featstore"]["format_version"]
    return {"store": str(path), "version": version, **report}


def describe_rebuild(result: dict[str, Any]) -> str:
    """What a rebuild changed, as lines for people.

    Args:
        result: From :func:`rebuild`.
    """
    lines = []
    for name, found in result["models"].items():
        kinds = ("special", "exact", "role", "sinks")
        also = [f"{human(found[f'{kind}_changed'])} {kind}" for kind in kinds if found[f"{kind}_changed"]]
        also_changed = f"; also changed: {', '.join(also)}" if also else ""
        lines.append(
            f"{name}: {human(found['ends_changed'])} of {human(found['rows'])} rows end at another byte{also_changed}"
        )
    for key, policies in result["pairs"].items():
        for policy, moved in policies.items():
            lines.append(
                f"{key} ({policy}): {human(moved['before'])} pairs before, {human(moved['after'])} after: "
                f"{human(moved['removed'])} removed, {human(moved['added'])} added"
            )
    for key, sums in result["moments"].items():
        again = "summed again" if sums["summed"] else f"{sums['kept']} blocks kept, their pairs are the same"
        lines.append(f"{key} moments: {again}")
    if result["from_version"] != result["version"]:
        lines.append(f"{result['store']}: format version {result['from_version']} is now {result['version']}")
    if not result["changed"]:
        lines.append(f"{result['store']}: its tokens and pairs are those of its text")
    return "\n".join(lines)


def _tokenizers(store: Store, model: Sequence[str], allowed: Allowed, *, quiet: bool) -> dict[str, models.ModelInfo]:
    """What is known of every model of a store, with its tokenizer set to read control tokens as the store's were."""
    references = references_of(store, model, allowed, quiet=quiet)
    found = {}
    for name in store.models:
        if name not in references:
            raise StoreStateError(
                f"{store.path} does not say which model {name!r} is; say where its tokenizer is with --model {name}=REF"
            )
        try:
            # Stores from before there was a choice kept control tokens that the text quotes as they are.
            kept = held_control_tokens(store.attributes["corpus"])
            found[name] = models.inspect_model(parse_model(references[name], allowed), kept)
        except FeatstoreError as error:
            raise ModelLoadError(
                f"the tokenizer of {name!r} is needed: {error}; say where it is with --model {name}=REF"
            ) from error
    return found


def _table(store: Store, planned: PlannedCorpus, info: models.ModelInfo, *, quiet: bool) -> NewTable:
    """A model's token table, once its ids have come out as they are stored."""
    name = info.spec.name
    stored = store.columns(name, "id", "window")
    # The states are there: however long a window is, the model has read it.
    longest = int(np.bincount(stored["window"]).max(initial=0)) + 1
    with progress(f"tokenise {name}", len(planned.window_document), "windows", quiet=quiet) as tick:
        try:
            table = plan_model(planned, info.tokenizer, name, max(info.context, longest), tick, date=_date(store))
        except (OffsetError, CorpusError) as error:
            raise _refusal(store, info, f"cannot read {_unreadable(store, info)} ({error})") from error
    difference = _first_difference(stored["id"], stored["window"], table)
    if difference is not None:
        raise _refusal(store, info, difference)
    told = {key: value for key, value in info.describe().items() if key in _TOLD}
    if holds_conversations(planned):
        told["chat_template_sha256"] = digest(info.tokenizer.chat_template)
    return NewTable(table.columns, told | {"tokens_sha256": table.hash, "byte_ends": tokens.ends_from(info.tokenizer)})


def _date(store: Store) -> str:
    """The day that chat templates were told."""
    return str(store.attributes["corpus"].get("date", DATE))


def _refusal(store: Store, info: models.ModelInfo, what: str) -> StoreStateError:
    name = info.spec.name
    return StoreStateError(
        f"{store.path}: the tokenizer of {name!r} ({info.spec.ref}) {what}; nothing was changed: name the one that the "
        f"states were made with (--model {name}=REF), or extract again"
    )


def _unreadable(store: Store, info: models.ModelInfo) -> str:
    """The first window that cannot be tokenised, in words."""
    for window in range(len(store.corpus.window_document)):
        try:
            tokenize_windows(store.corpus, [window], info.tokenizer, info.spec.name, date=_date(store))
        except (OffsetError, CorpusError):
            return f"window {window}"
    return "a window"


def _first_difference(ids: Any, window: Any, table: PlannedModel) -> str | None:
    """The first token that is not the stored one, in words; None where all are.

    Args:
        ids: int32 ``(n,)``, as stored.
        window: int32 ``(n,)``.
        table: From the text.
    """
    fresh = table.columns
    count = min(len(ids), len(fresh["id"]))
    wrong = np.flatnonzero((ids[:count] != fresh["id"][:count]) | (window[:count] != fresh["window"][:count]))
    if not len(wrong) and len(ids) == len(fresh["id"]):
        return None
    row = int(wrong[0]) if len(wrong) else count
    number = int(min(column[row] for column in (window, fresh["window"]) if row < len(column)))
    place = row - int(table.row_start[number])
    held, new = (
        f"token {int(found[row])}" if row < len(found) and at[row] == number else "nothing"
        for found, at in ((ids, window), (fresh["id"], fresh["window"]))
    )
    return f"gives other ids than those whose states are stored: window {number}, token {place}, {new} for {held}"
