"""Whose a reference is: the user's own, or out of a file that somebody else may have written.

What is typed is the user's, and is kept in a ledger. What a store, a card or an adapter's configuration names is taken
where the ledger has it, or where it is a path inside the working folder; else it is shown, and taken only with --yes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from featstore.errors import StrangeReferenceError
from featstore.models.references import Allowed, ModelSpec, expanded
from featstore.runtime.console import err
from featstore.runtime.known import Named, recall
from featstore.runtime.known import remember as keep
from featstore.text.sources import Source

#: Kinds of text that lie in files on this machine.
_FILES = ("text", "jsonl")
#: What was shown by this process: a model is opened several times.
_SAID: set[str] = set()


def named(spec: ModelSpec) -> Named:
    """A model as the ledger knows it: a path by where it leads, a hub id with its revision.

    Args:
        spec: Name and reference.
    """
    path = expanded(spec.ref)
    if spec.ref.startswith((".", "/", "~")) or path.suffix == ".gguf" or path.is_dir():
        return Named("path", _real(path))
    return Named("hub", spec.ref, spec.revision or "main")


def remember(specs: Iterable[ModelSpec] = (), *, text: Source | None = None, quiet: bool = False) -> None:
    """Keep references that the user typed, or made.

    Args:
        specs: Names and references of models.
        text: Where text comes from.
        quiet: Do not say that they cannot be kept.
    """
    trouble = keep([*(named(spec) for spec in specs), *([] if text is None else [named_text(text)])])
    if trouble and not quiet:
        err.print(f"note: {trouble}; later commands will ask for --yes")


def vouch(
    specs: Sequence[ModelSpec],
    place: str,
    *,
    beside: Path | None = None,
    remedy: str | None = None,
    quiet: bool = False,
) -> None:
    """Refuse references out of a file that are neither the user's own nor allowed.

    Args:
        specs: What the file names; what is allowed stands in them.
        place: The file, for the message.
        beside: A folder that the user named: what lies in it is the user's as well.
        remedy: What to do instead of giving --yes; by default, to give ``--model NAME=REF``.
        quiet: Do not show what is taken because it is allowed.

    Raises:
        StrangeReferenceError: The message shows every such reference, and what to do.
    """
    known, trouble = recall()
    strange = [spec for spec in specs if named(spec) not in known and not _inside(named(spec), beside)]
    if not strange:
        return
    shown = ", ".join(f"{spec.name}={_shown(spec)}" for spec in strange)
    if all(spec.allowed.references for spec in strange):
        _say(f"as {place} says: {shown}", quiet=quiet)
        return
    raise _refusal(place, shown, remedy or f"say which model you mean: --model {strange[0].name}=REF", trouble)


def named_text(source: Source) -> Named:
    """A text as the ledger knows it: files by where they lead, a dataset of a hub by its name.

    Args:
        source: Where text comes from.
    """
    if source.kind in _FILES:
        return Named("data", f"{source.kind}:{_real(Path(source.location))}")
    return Named("data", source.text)


def vouch_for_text(source: Source, place: str, allowed: Allowed, *, quiet: bool = False) -> None:
    """Refuse a text that a store names, unless it is the user's own or allowed.

    Args:
        source: As the store has it.
        place: The store, for the message.
        allowed: What the user allows.
        quiet: Do not show what is taken because it is allowed.

    Raises:
        StrangeReferenceError: The message shows it, and what to do.
    """
    known, trouble = recall()
    if named_text(source) in known:
        return
    if source.kind in _FILES and _inside(Named("path", _real(Path(source.location))), None):
        return
    if allowed.references:
        _say(f"as {place} says: text from {source.text!r}", quiet=quiet)
        return
    raise _refusal(place, f"the text {source.text!r}", "say which text you mean: --dataset", trouble)


def _say(line: str, *, quiet: bool) -> None:
    if not quiet and line not in _SAID:
        _SAID.add(line)
        err.print(line)


def _refusal(place: str, shown: str, remedy: str, trouble: str | None) -> StrangeReferenceError:
    why = f" ({trouble})" if trouble else ""
    return StrangeReferenceError(
        f"{place} names {shown}, which you have not named yourself{why}; if you trust it, give --yes (yes=True in "
        f"Python), or {remedy}"
    )


def _shown(spec: ModelSpec) -> str:
    """A reference with its control characters escaped, and where it leads."""
    kept = named(spec)
    if kept.kind == "hub":
        return f"{spec.ref + ('@' + spec.revision if spec.revision else '')!r} (from a hub)"
    return f"{spec.ref!r} (on this machine, outside the working folder)"


def _inside(one: Named, beside: Path | None) -> bool:
    """Whether a path leads into the working folder, or into one that the user named."""
    if one.kind != "path":
        return False
    folders = [_real(folder) for folder in (Path.cwd(), beside) if folder is not None]
    # In the root of a disk, everything is inside.
    return any(folder != os.sep and Path(one.reference).is_relative_to(folder) for folder in folders)


def _real(path: Path) -> str:
    try:
        return str(path.resolve())
    except (OSError, ValueError, RuntimeError):  # a circle of links, a name that no disk has
        return str(path.absolute())
