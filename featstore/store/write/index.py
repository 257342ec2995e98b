"""What follows from stored rows and tokens: the sink mask and the pair indexes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.store.read.columns import PIECE, pieces, whole_windows
from featstore.store.read.first import first_rows
from featstore.store.read.pairs import check_policy, last_at_each_end, match_ends
from featstore.store.read.store import Store
from featstore.store.write.writer import StoreWriter, adding_to

#: What a stored mask follows from beside norms; masks of an earlier rule are derived again.
SINK_RULE = "first"


def sink_mask(store: Store, name: str, threshold: float) -> NDArray[np.bool_]:
    """Which rows are attention sinks: too loud, or the first of a window without a start token.

    Args:
        store: With tokens and all norms of the model committed.
        name: Model.
        threshold: Multiple of the median norm.

    Returns:
        bool ``(n,)``.
    """
    mask = np.zeros(store.model(name).rows, dtype=bool)
    for at, first, (loud,) in sink_pieces(store, name, threshold):
        mask[at] = first | loud
    return mask


def sink_pieces(
    store: Store, name: str, *thresholds: float
) -> Iterator[tuple[slice, NDArray[np.bool_], list[NDArray[np.bool_]]]]:
    """What :func:`sink_mask` is made of, some windows at a time.

    Args:
        store: With tokens and all norms of the model committed.
        name: Model.
        thresholds: Multiples of the median norm.

    Yields:
        Rows, which of them are the first of a window without a start token, and for each threshold which are louder.
    """
    window, byte_end, special = store.columns(name, "window", "byte_end", "special").values()
    norms = [(store.norms(name, int(layer)), median) for layer, median in store.median_norms(name).items()]
    for at in whole_windows(window):
        held = [(norm[at], median) for norm, median in norms]
        loud = [np.logical_or.reduce([norm > threshold * median for norm, median in held]) for threshold in thresholds]
        yield at, first_rows(window[at], byte_end[at], special[at]), loud


def loud_rows(store: Store, name: str, threshold: float) -> NDArray[np.bool_]:
    """Which rows exceed ``threshold`` times the layer's pilot median norm at any stored layer.

    Args:
        store: With all norms of the model committed.
        name: Model.
        threshold: Multiple of the median.

    Returns:
        bool ``(n,)``.
    """
    mask = np.zeros(store.model(name).rows, dtype=bool)
    for layer, median in store.median_norms(name).items():
        mask |= store.norms(name, int(layer)) > threshold * median
    return mask


def write_sinks(writer: StoreWriter, name: str) -> None:
    """Derive and commit a model's sink mask, unless the one that is there follows from the same rows.

    Args:
        writer: The store's writer; all norms of the model are committed.
        name: Model.
    """
    store = writer.view
    threshold = float(store.attributes["mask"]["sink_threshold"])
    attributes = store.model(name).attributes
    unit = f"models/{name}/sinks"
    basis = f"{attributes['tokens_sha256']} {attributes['layers']} {threshold} {SINK_RULE}"
    if (writer.entry(unit) or {}).get("basis") != basis:
        writer.vectors(unit, {f"models/{name}/tokens/sink": sink_mask(store, name, threshold)}, basis=basis)


def pairs_unit(first: str, second: str, policy: str) -> str:
    """Name of the unit that holds a pair index.

    Args:
        first: Model earlier in store order.
        second: The other.
        policy: ``end``, ``word`` or ``byte``.
    """
    return f"pairs/{first}__{second}/{policy}"


def pair_rows(store: Store, first: str, second: str, policy: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows of two models belong together, from their token tables and the text alone.

    Args:
        store: With both models' tokens.
        first: Model earlier in store order.
        second: The other.
        policy: ``end``, ``word`` or ``byte``.

    Returns:
        int64 ``(m,)`` rows of the first model and of the second, in document order.
    """
    parts = list(pair_pieces(store, first, second, policy))
    row_a, row_b = (np.concatenate([part[side] for part in parts] or [np.zeros(0, np.int64)]) for side in (0, 1))
    return row_a, row_b


def pair_pieces(
    store: Store, first: str, second: str, policy: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """What :func:`pair_rows` finds, some windows at a time.

    Args:
        store: With both models' tokens.
        first: Model earlier in store order.
        second: The other.
        policy: ``end``, ``word`` or ``byte``.
    """
    text = store.corpus
    message_stop = text.document_start[text.message_document] + text.message_end
    windows = len(text.window_document)
    tables = [store.tokens(name) for name in (first, second)]
    starts = [_row_starts(table.window, windows) for table in tables]
    step = max(windows * PIECE // max(*(len(table.id) for table in tables), 1), 1)
    for window in range(0, windows, step):
        sides = []
        for table, start in zip(tables, starts, strict=True):
            at = slice(int(start[window]), int(start[min(window + step, windows)]))
            columns = (table.window[at], table.byte_end[at], table.special[at], table.exact[at])
            keys, rows = last_at_each_end(*columns)
            sides.append((keys, rows + at.start))
        _, row_a, row_b = match_ends(
            sides[0], sides[1], policy, text.window_offset, text.window_stop, text.text, message_stop
        )
        yield row_a, row_b


def _row_starts(window: NDArray[np.int32], windows: int) -> NDArray[np.int64]:
    """First row of every window, and at the end how many rows there are."""
    counts = np.zeros(windows + 1, np.int64)
    for at in pieces(len(window)):
        counts[1:] += np.bincount(window[at], minlength=windows)
    return np.cumsum(counts)


def write_pairs(writer: StoreWriter, first: str, second: str, policy: str) -> None:
    """Build and commit the pair index of two models.

    Args:
        writer: The store's writer; text and tokens of both are committed.
        first: Model earlier in store order.
        second: The other.
        policy: ``end``, ``word`` or ``byte``.
    """
    store, base = writer.view, f"pairs/{first}__{second}"
    unit = pairs_unit(first, second, policy)
    basis = " ".join(str(store.model(name).attributes.get("tokens_sha256")) for name in (first, second))
    if (writer.entry(unit) or {}).get("basis") == basis:
        return
    row_a, row_b = pair_rows(store, first, second, policy)
    ordinary = {name: max(int((~store.tokens(name).special).sum()), 1) for name in (first, second)}
    coverage = {name: len(row_a) / count for name, count in ordinary.items()}
    writer.group(base, {})
    writer.group(unit, {"featstore": {"policy": policy, "pairs": len(row_a), "coverage": coverage}})
    writer.vectors(unit, {f"{unit}/row_a": row_a, f"{unit}/row_b": row_b}, basis=basis)


def add_pairs(path: Path, policy: str) -> dict[str, Any]:
    """Add the pair indexes of a policy to a complete store; those that exist stay.

    Args:
        path: The store.
        policy: ``end``, ``word`` or ``byte``.

    Returns:
        ``{"pairs": {"a__b": {"pairs": count}}}``.

    Raises:
        FeatstoreError: No such store or policy, or another process is writing.
    """
    check_policy(policy)
    with adding_to(path) as writer:
        for first, second in combinations(writer.view.models, 2):
            write_pairs(writer, first, second, policy)
        writer.seal(writer.attributes() or {})
        store = writer.view
    return {
        "pairs": {
            f"{first}__{second}": {"pairs": len(store.pairs(first, second, policy))}
            for first, second in combinations(store.models, 2)
        }
    }
