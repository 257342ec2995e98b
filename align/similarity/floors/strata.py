"""Documents that can change places: strata of similar length, the positions that all of a stratum have, and draws.

Under the hypothesis that two models share nothing but where in a document a row stands, the second model's documents
could as well have come in another order. That is exact only for documents of the same positions. So documents are put
into strata of similar length, each stratum keeps the positions that all of its documents have, and documents are
permuted within strata, all permutations equally likely. The rows are then the same in every draw, each draw is a
permutation of them, and these form a group: value and draws are exchangeable under the hypothesis, and the p value is
valid whatever the lengths (Hemerik and Goeman, *Exact testing with random permutations*, TEST 27, 2018). A permutation
may leave documents where they are; drawing only those that leave none would make the draws likelier to agree with each
other than with the value, and the test reject too often with few documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align.similarity.measures.base import Partners

#: Documents of a stratum, at least, where there are so many: of each, one in so many draws stays where it is.
STRATUM = 8
#: Fewer documents have fewer than twenty orders, so that no p value could be 0.05.
FEWEST = 4

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Strata:
    """Rows that can change places with those of other documents at the same place.

    Attributes:
        rows: For each stratum int64 ``(documents, places)``, numbers of rows: a line for each document.
        n: Rows that were given.
    """

    rows: tuple[Index, ...]
    n: int

    @property
    def chosen(self) -> Index:
        """The rows that take part, by stratum, place and document."""
        return np.concatenate([np.zeros(0, np.int64), *(block.T.ravel() for block in self.rows)])

    @property
    def documents(self) -> int:
        """Documents that take part."""
        return sum(len(block) for block in self.rows)

    def limited(self, most: int, rng: np.random.Generator) -> Strata:
        """A random choice of places, the same for all documents of a stratum, with at most so many rows.

        Args:
            most: Rows; every stratum keeps at least one place.
            rng: Of the choice.
        """
        if sum(block.size for block in self.rows) <= most:
            return self
        places = np.concatenate([np.full(block.shape[1], s) for s, block in enumerate(self.rows)])
        order = rng.permutation(len(places))
        sizes = np.array([len(block) for block in self.rows])
        taken = order[np.cumsum(sizes[places[order]]) <= most]
        first = np.cumsum([0, *(block.shape[1] for block in self.rows)])
        kept = [block[:, np.sort(taken[places[taken] == s] - first[s])] for s, block in enumerate(self.rows)]
        return Strata(tuple(block for block in kept if block.size), self.n)

    def partners(self, document: Index, draws: int, rng: np.random.Generator) -> Partners:
        """The true pairing and random exchanges of whole documents.

        Args:
            document: int64 ``(n,)``, of all rows that were given.
            draws: Exchanges.
            rng: Of the draws.

        Returns:
            Over the rows of :attr:`chosen`, the true pairing first.
        """
        chosen = self.chosen
        index = np.tile(np.arange(len(chosen)), (1 + draws, 1))
        shapes = tuple((int(block.shape[0]), int(block.shape[1])) for block in self.rows)
        for line in index[1:]:
            start = 0
            for documents, places in shapes:
                order = rng.permutation(documents)
                own = line[start : start + documents * places].reshape(places, documents)
                own[:] = own[:, order]
                start += documents * places
        return Partners(index, np.unique(document[chosen], return_inverse=True)[1].astype(np.int64), shapes)


def strata(document: Index, place: Index) -> Strata:
    """Put documents of similar length together, so that as many rows as possible have partners.

    Args:
        document: int64 ``(n,)``.
        place: int64 ``(n,)``, where in its document a row is; a document has a place once.

    Returns:
        No strata where there are fewer than :data:`FEWEST` documents.
    """
    blocks = []
    for members in grouped(np.unique(document, return_counts=True)):
        rows = np.flatnonzero(np.isin(document, members))
        places, times = np.unique(place[rows], return_counts=True)
        rows = rows[np.isin(place[rows], places[times == len(members)])]
        order = rows[np.lexsort((place[rows], document[rows]))]
        if len(order):
            blocks.append(order.reshape(len(members), -1).astype(np.int64))
    return Strata(tuple(blocks), len(document))


def grouped(documents: tuple[Index, Index]) -> list[Index]:
    """Documents by length, cut so that as many rows as possible are within the shortest of their group.

    Args:
        documents: Their names and how many rows they have.

    Returns:
        Groups of at least :data:`STRATUM` documents; of few documents one group of at least three quarters of them. A
        document that would shorten all others by more than it has takes no part.
    """
    names, sizes = documents
    count = len(names)
    if count < FEWEST:
        return []
    order = np.argsort(-sizes, kind="stable")
    lengths = sizes[order]
    least = min(STRATUM, max(FEWEST, -(-3 * count // 4)))
    # best[i]: rows kept of the i longest documents; step[i]: documents of the last group, 0 where the i-th is left out.
    best, step = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for i in range(1, count + 1):
        best[i], step[i] = best[i - 1], 0
        for size in range(least, min(2 * least - 1, i) + 1):
            kept = best[i - size] + size * lengths[i - 1]
            if kept > best[i]:
                best[i], step[i] = kept, size
    groups, i = [], count
    while i > 0:
        if step[i]:
            groups.append(np.sort(names[order[i - step[i] : i]]))
        i -= max(int(step[i]), 1)
    return groups[::-1]


def numbered(first: Index, second: Index) -> Index:
    """The combinations of two labels, numbered from 0 without gaps.

    Args:
        first: int64 ``(n,)``.
        second: int64 ``(n,)``.
    """
    names, other = np.unique(second, return_inverse=True)
    _, own = np.unique(first, return_inverse=True)
    found: Index = np.unique(own.ravel() * len(names) + other.ravel(), return_inverse=True)[1].ravel()
    return found


def by_place(document: Index, place: Index, most: int, seed: int) -> Index:
    """Choose rows so that documents of a stratum keep the same places; every row is as likely as any other.

    Args:
        document: int64 ``(n,)``.
        place: int64 ``(n,)``.
        most: Rows at most; where documents of one stratum are more than that, fewer documents.
        seed: Of the choice.

    Returns:
        Numbers of rows, ascending; all where they are no more.
    """
    if len(document) <= most:
        return np.arange(len(document))
    rng = np.random.default_rng(seed)
    groups = grouped(np.unique(document, return_counts=True))
    group = np.full(int(document.max()) + 1, -1, dtype=np.int64)
    for number, members in enumerate(groups):
        group[members] = number
    # Documents in no stratum are their own.
    alone = group[document] < 0
    group = np.where(alone, len(groups) + document, group[document])
    key = numbered(group, place)
    sizes = np.bincount(key)
    order, left, taken = rng.permutation(len(sizes)), most, np.zeros(len(sizes), dtype=bool)
    for number in order:
        if sizes[number] <= left:
            taken[number], left = True, left - sizes[number]
            if not left:
                break
    kept = taken[key]
    if left:
        # What is left is filled with some documents of one more place.
        rest = np.flatnonzero(key == order[~taken[order]][0])
        kept[rng.choice(rest, left, replace=False)] = True
    return np.flatnonzero(kept)
