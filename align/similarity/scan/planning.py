"""What a scan is: which pairs, which layers, and how they are cut into tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from align.moments.scatter import BLOCK_ROWS
from align.solvers.row_effects import Documents
from featstore.errors import SpecError
from featstore.runtime.console import human_bytes

#: Memory that a scan may use unless told otherwise, over all workers and the process that adds up.
MEMORY = 2 << 30
#: Rows of a float32 product: shorter sums keep more digits, and the rows of a task have to fit into memory.
CUT_ROWS = 4096
#: Tasks that shall fit into the memory side by side before groups are made wider.
SLOTS = 4
#: Runs of a block that a short store is cut into at least, so that several workers have something to do.
_LEAST_RUNS = 8
#: Longest run: adding its result up costs nothing beside it, and no more than so many rows are summed in vain.
_LONGEST_RUN = 1 << 16
#: Rows of short documents whose kernels are made together.
TOGETHER = 128
#: What an entry of a product costs that is squared, and added up in float64, in multiplications of rows.
_ENTRY = 320


@dataclass(frozen=True)
class Site:
    """One layer of one side.

    Attributes:
        model: Model name.
        layer: Layer.
        source: Whether its rows are those of the pairs' first model.
    """

    model: str
    layer: int
    source: bool


@dataclass(frozen=True)
class Selection:
    """Which pairs of which store, small enough to travel with every task.

    Attributes:
        path: The store, as the workers reach it: absolute, since theirs is another working directory.
        fingerprint: Of the store; a worker that finds another one there refuses.
        source: Model name.
        target: Model name.
        policy: Pair policy.
        keep_sinks: Whether attention sinks are in.
        roles: Roles of the pairs; None for all.
    """

    path: str
    fingerprint: str
    source: str
    target: str
    policy: str
    keep_sinks: bool
    roles: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Span:
    """A run of pairs that one task sums.

    Attributes:
        start: First pair.
        stop: Pair after the last.
        document: The long document that these are a piece of; None where the run has whole short ones, or knows none.
        first: Whether this is its first piece.
        last: Whether this is its last piece.
    """

    start: int
    stop: int
    document: int | None = None
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Run:
    """A task: one block over one run of pairs.

    Attributes:
        groups: The block's layers: of one group, or of two.
        start: First pair.
        stop: Pair after the last.
        cut: Pairs of one float32 product.
        batch: Rows of a batch, None where none are made.
        seed: Of the batches.
        span: The run, of sums by document; None where these know no documents.
        alone: Whether every feature is summed alone as well.
    """

    groups: tuple[tuple[Site, ...], ...]
    start: int
    stop: int
    cut: int
    batch: int | None
    seed: int
    span: Span | None = None
    alone: bool = False


@dataclass(frozen=True)
class Plan:
    """How a scan is cut up; a function of rows, widths and memory alone, since it decides the last bits.

    Attributes:
        n: Rows.
        cut: Rows of one float32 product.
        run: Rows of a task at most; a multiple of ``cut``.
        groups: Places of the layers of each group.
        slots: Results that may exist or be in the making at a time.
        memory: Bytes that so many take, with the rows they are made from and what adds them up.
        spans: The runs, which cover all rows in order.
    """

    n: int
    cut: int
    run: int
    groups: tuple[tuple[int, ...], ...]
    slots: int
    memory: int
    spans: tuple[Span, ...]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Two groups each, or one with itself."""
        return list(combinations_with_replacement(range(len(self.groups)), 2))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """First row and row after the last of every run."""
        return [(span.start, span.stop) for span in self.spans]


def plan(
    widths: Sequence[int],
    n: int,
    *,
    memory: int = MEMORY,
    batch: int | None = None,
    documents: Documents | None = None,
) -> Plan:
    """Cut a scan up: the fewest groups of which :data:`SLOTS` tasks fit into memory, or else a task of single layers.

    Args:
        widths: Of every layer.
        n: Rows.
        memory: Bytes for everything at once: results, rows, and the totals they are added to.
        batch: Rows of a batch, where batches are made.
        documents: Of the rows, one after another, where sums are by document. Then runs end where documents do, and a
            document longer than a product of rows has runs of its own.

    Raises:
        SpecError: Not even single layers fit, or batches are too small or too large.
    """
    cut = CUT_ROWS
    if batch is not None:
        if not 4 <= batch <= BLOCK_ROWS:
            raise SpecError(f"batches of {batch} rows: choose 4 to {BLOCK_ROWS}")
        # Batches are dealt from the rows of a cut: the more, the less they are of one document.
        cut = BLOCK_ROWS - BLOCK_ROWS % batch
    run = min(max(-(-n // _LEAST_RUNS // cut), 1), max(_LONGEST_RUN // cut, 1)) * cut
    spans = tuple(Span(start, min(start + run, n)) for start in range(0, n, run))
    if documents is not None:
        spans = tuple(_by_document(documents, run, cut))
    # A store of fewer rows than a cut needs no room for a whole one.
    rows = min(cut, n)
    for count in range(1, len(widths) + 1):
        groups = _packed(widths, max(-(-sum(widths) // count), *widths))
        task, rest = _bytes(groups, widths, rows, batch, spans if documents is not None else None)
        if rest + SLOTS * task <= memory:
            break
    else:
        groups = [[place] for place in range(len(widths))]
        task, rest = _bytes(groups, widths, rows, batch, spans if documents is not None else None)
    if rest + task > memory:
        raise SpecError(
            f"{human_bytes(memory)} of memory are too few for layers of width {max(widths)}; "
            f"allow at least {human_bytes(rest + task)}"
        )
    slots = (memory - rest) // task
    return Plan(n, cut, run, tuple(map(tuple, groups)), slots, rest + slots * task, spans)


def _by_document(documents: Documents, run: int, cut: int) -> Iterator[Span]:
    """Runs of whole documents, and pieces of those that are longer than a product of rows."""
    begun = at = 0
    for number, size in enumerate(documents.sizes.tolist()):
        if at > begun and (size > cut or at + size - begun > run):
            yield Span(begun, at)
            begun = at
        if size > cut:
            for start in range(at, at + size, run):
                stop = min(start + run, at + size)
                yield Span(start, stop, number, start == at, stop == at + size)
            begun = at + size
        at += size
    if at > begun:
        yield Span(begun, at)


def _packed(widths: Sequence[int], limit: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for place, width in enumerate(widths):
        if groups[-1] and sum(widths[i] for i in groups[-1]) + width > limit:
            groups.append([])
        groups[-1].append(place)
    return groups


def _bytes(
    groups: Sequence[Sequence[int]],
    widths: Sequence[int],
    rows: int,
    batch: int | None,
    spans: Sequence[Span] | None,
) -> tuple[int, int]:
    """What one task takes while it runs, and what adding up takes; of the largest block."""
    sums = sorted((sum(widths[i] for i in group) for group in groups), reverse=True)
    p, q = sums[0], sums[min(1, len(sums) - 1)]
    # The float64 sums and a float32 product; the rows side by side, and one layer of them as it is read and decoded.
    beside = p if len(sums) == 1 else p + q
    task = 12 * p * q + 4 * rows * beside + 12 * rows * max(widths)
    if batch is not None:
        layers = 2 * max(map(len, groups))
        # The rows of a batch, and those of one layer in float64.
        task += batch * batch * (8 * layers + 12) + 4 * batch * beside + 8 * batch * max(widths)
    beyond = 0
    if spans is not None:
        layers, most = 2 * max(map(len, groups)), min(rows, longest_kernel(p, q))
        # Kernels of the rows of a document, and what is widened of them or of the product.
        task += 4 * layers * most * (most + 128) + 8 * 256 * max(widths)
        # The sums of a document whose pieces are not all there, and a copy in a checkpoint.
        beyond = 2 * 8 * p * q if any(not span.last for span in spans) else 0
    # The total, a result on its way to it, what a checkpoint writes; the centred copies of one pair of layers.
    return task, 3 * 8 * p * q + 4 * 8 * max(widths) ** 2 + beyond


def longest_kernel(width_p: int, width_q: int) -> int:
    """The longest document whose kernels are made; of a longer one it is its product of features, which is cheaper.

    Args:
        width_p: Of all layers of the first group.
        width_q: Of the second, or the first again.
    """
    return max(TOGETHER, math.isqrt(_ENTRY * width_p * width_q // (width_p + width_q)))
