"""Which models and texts the user named, and which a store names and the user has to vouch for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import SpecError
from featstore.models.references import NOTHING, Allowed, parse_model
from featstore.models.trust import remember, vouch
from featstore.store import Store


def references_of(
    store: Store, model: Sequence[str] = (), allowed: Allowed = NOTHING, *, quiet: bool = False
) -> dict[str, str]:
    """``NAME=REF`` of every model of a store that has a reference; those given take the place of those on record.

    Args:
        store: Any store.
        model: ``NAME=REF`` values that the user typed.
        allowed: Whether references are taken that the user has not named.
        quiet: Do not show those that are.

    Raises:
        SpecError: A name that is not in the store.
        StrangeReferenceError: The store names a model that the user has not named, and none was typed in its place.
    """
    typed = {spec.name: text for text in model for spec in (parse_model(text),)}
    for name, text in typed.items():
        if name not in store.models:
            raise SpecError(f"--model {text}: {store.path} holds {', '.join(store.models)}, name one of these")
    remember((parse_model(text) for text in typed.values()), quiet=quiet)
    found = {name: typed.get(name) or reference_of(store.model(name).attributes, name) for name in store.models}
    found = {name: text for name, text in found.items() if text}
    vouch_for([text for name, text in found.items() if name not in typed], store.path, allowed, quiet=quiet)
    return found


def reference_of(attributes: Mapping[str, Any], name: str) -> str:
    """What a store says of where a model is, as ``NAME=REF``; empty where it says nothing.

    Args:
        attributes: Of the model.
        name: Of the model.
    """
    reference, revision = attributes.get("reference"), attributes.get("revision")
    return f"{name}={reference}" + (f"@{revision}" if revision else "") if reference else ""


def vouch_for(references: Iterable[str], path: Path | str, allowed: Allowed, *, quiet: bool = False) -> None:
    """Refuse what a store says of where models are, unless the user named it or allows it.

    Args:
        references: ``NAME=REF`` of models.
        path: The store.
        allowed: What the user allows.
        quiet: Do not show what is allowed.

    Raises:
        StrangeReferenceError: A reference is neither; the message shows it.
    """
    vouch([parse_model(text, allowed) for text in references], str(path), quiet=quiet)
