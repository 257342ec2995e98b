"""Which windows of a store are scored, and which of their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluate.injection.wire import Crossing, crossing
from evaluate.stitching.scores import FIRST_SCORED
from featstore.errors import PairingError
from featstore.store import Store
from featstore.text.roles import count_roles, parse_roles, roles_text
from featstore.text.splits import SPLITS, TEST
from featstore.text.tokens import TokenizedWindow


@dataclass(frozen=True, eq=False)
class Window(Crossing):
    """One test window under both tokenizers.

    Attributes:
        number: Of the window in the store.
        document: Document number.
        source_row: First source row in the store.
        size: Bytes of its text.
        source_counts: bool ``(source tokens,)``, which of them have a role that is scored.
        target_counts: bool ``(target tokens,)``.
    """

    number: int
    document: int
    source_row: int
    size: int
    source_counts: NDArray[np.bool_]
    target_counts: NDArray[np.bool_]


def scored_windows(
    store: Store,
    source: str,
    target: str,
    *,
    split: int = TEST,
    max_tokens: int | None = None,
    roles: str | Iterable[str] | None = None,
) -> list[Window]:
    """Windows of a split with their position maps, whole windows up to a budget, round-robin over documents.

    Args:
        store: Complete store.
        source: Model name.
        target: Model name.
        split: 0 train, 1 validation, 2 test.
        max_tokens: Target tokens at most, scored or not; at least one window is returned.
        roles: Roles of the tokens that are scored, as :func:`featstore.text.roles.parse_roles` takes them; None for
            all. Windows without any are left out.

    Raises:
        PairingError: The split has no window with a scored token.
        SpecError: An unknown role.
    """
    wanted = parse_roles(roles)
    table_a, table_b = store.tokens(source), store.tokens(target)
    corpus = store.corpus
    unit = corpus.window_unit
    numbers = np.flatnonzero(corpus.window_split == split)
    # One window of every document before the second of any: the interval comes from documents.
    order_within = np.zeros(len(numbers), dtype=np.int64)
    seen: dict[int, int] = {}
    for i, w in enumerate(numbers):
        document = int(unit[w])
        order_within[i] = seen[document] = seen.get(document, -1) + 1
    chosen: list[Window] = []
    total = 0
    for w in numbers[np.argsort(order_within, kind="stable")]:
        a, b = (slice(*np.searchsorted(t.window, [w, w + 1])) for t in (table_a, table_b))
        if b.stop - b.start <= FIRST_SCORED:
            continue
        counts = [_of_roles(t.role[rows], wanted) for t, rows in ((table_a, a), (table_b, b))]
        if wanted is not None and not (counts[1] & ~table_b.special[b])[FIRST_SCORED:].any():
            continue
        if chosen and max_tokens is not None and total + (b.stop - b.start) > max_tokens:
            break
        first = TokenizedWindow(table_a.id[a], table_a.byte_end[a], table_a.special[a], table_a.exact[a])
        second = TokenizedWindow(table_b.id[b], table_b.byte_end[b], table_b.special[b], table_b.exact[b])
        text = crossing(first, second, table_a.sink[a], table_b.sink[b])
        size = int(corpus.window_end[w] - corpus.window_start[w])
        chosen.append(
            Window(
                **vars(text),
                number=int(w),
                document=int(unit[w]),
                source_row=int(a.start),
                size=size,
                source_counts=counts[0],
                target_counts=counts[1],
            )
        )
        total += b.stop - b.start
    if not chosen and wanted is not None:
        rows = (corpus.window_split[table_b.window] == split) & ~table_b.special
        held = ", ".join(f"{name} ({count})" for name, count in count_roles(table_b.role[rows]).items()) or "none"
        raise PairingError(
            f"the {SPLITS[split]} split of {store.path} has no token to score of the role {roles_text(roles)}; "
            f"the roles of {target!r} there are {held}: choose --roles among these, or all"
        )
    if not chosen:
        raise PairingError(f"the {SPLITS[split]} split of {store.path} has no window to score; extract more documents")
    return chosen


def _of_roles(role: NDArray[np.uint8], numbers: tuple[int, ...] | None) -> NDArray[np.bool_]:
    return np.ones(len(role), dtype=bool) if numbers is None else np.isin(role, numbers)
