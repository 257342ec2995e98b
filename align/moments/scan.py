"""The moments of layer pairs: from one pass over a store's rows, or from the sums it keeps.

Layer pairs share their layers, so what is summed are blocks (:mod:`featstore.store.moments.sums`): one of every source
and of every target layer with itself, and one for every layer pair. Five layers by five are 35 blocks instead of 75.
Both ways sum the same rows; what is stored is rounded to 24 bits, so a fit's figures agree to 1e-6.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations

import numpy as np

from align.layers import LayerPair
from align.moments.control import exchanged
from align.moments.device import multiplier
from align.moments.scatter import (
    Array,
    Moments,
    Scatter,
    about,
    as_if_shuffled,
    centered,
    end_to_end,
    means,
    moved_block,
)
from featstore.errors import FitError, SpecError, StoreStateError
from featstore.runtime.console import human_bytes
from featstore.store import Store
from featstore.store.moments import stored as kept
from featstore.store.moments.stored import MEMORY, Site, SitePair, StoredMoments, has_rows
from featstore.store.moments.sums import Block, BlockSums, Multiply, assemble
from featstore.store.read.pairs import Pairs
from featstore.text.splits import TRAIN, VALIDATION

#: Beside stored moments, which read no row, the shuffled control passes over so many train rows at most.
EXCHANGED_ROWS = 2**18

#: Fewest train pairs: below, no fit is worth the name.
MINIMUM_PAIRS = 8

#: A layer on one side of the pairs, ``("x", layer)`` or ``("y", layer)``: a model paired with itself has both.
Node = tuple[str, int]
_NodePair = tuple[Node, Node]


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass over the store knows of a layer pair.

    A scan gives both about the train means, which is where fits want them: there is one copy of a sum, and layer pairs
    share those of their layers.

    Attributes:
        train: Moments of the train pairs.
        val: Moments of the validation pairs, about the same origin.
        seed: Of the shuffled control.
        exchange: Gives the train moments with documents exchanged at equal places, by a pass over the rows; None where
            there are no rows, or more than are worth a pass beside stored moments.
    """

    train: Moments
    val: Moments
    seed: tuple[int, ...] = (0,)
    exchange: Callable[[], Moments] | None = None

    @property
    def means(self) -> tuple[Array, Array]:
        """Train means of source and target."""
        return means(self.train)

    @property
    def shuffled(self) -> Moments:
        """The train moments with partners of other rows: what a fit to them finds is no relation of these rows.

        With documents exchanged where that can be done, otherwise drawn as if rows had been shuffled. Made when asked
        for; the same seed and layer pair give the same, whatever else was scanned.
        """
        if self.exchange is not None:
            return self.exchange()
        return as_if_shuffled(self.train, np.random.default_rng(self.seed))

    @cached_property
    def without_partners(self) -> Scan:
        """The same rows with :attr:`shuffled` for train moments: what shuffled controls are fitted to, made once."""
        return replace(self, train=self.shuffled)

    @cached_property
    def centred(self) -> tuple[Scatter, Scatter]:
        """Train and validation rows about the train means, always the same two objects."""
        return centered(self.train), about(self.val, *self.means)

    @property
    def control(self) -> str:
        """How partners are taken away for :attr:`shuffled`, in words."""
        return "rows shuffled" if self.exchange is None else "documents exchanged"


def limit_rows(pairs: Pairs, max_rows: int | None, seed: int) -> Pairs:
    """Keep a random subset of pairs, in document order.

    Args:
        pairs: Any selection.
        max_rows: At most so many; None for all.
        seed: Of the choice.
    """
    if max_rows is None or len(pairs) <= max_rows:
        return pairs
    keep = np.zeros(len(pairs), dtype=bool)
    keep[np.random.default_rng(seed).choice(len(pairs), max_rows, replace=False)] = True
    return pairs.where(keep)


def scan(
    store: Store,
    pairs: Pairs,
    wanted: Sequence[LayerPair],
    *,
    seed: int = 0,
    device: str = "cpu",
    target_gram: bool = True,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, Scan]:
    """The moments of all layer pairs at once, reading every row once.

    All of them stay in memory, once for the train and once for the validation split: float64 ``(d, d)`` for every layer
    and every layer pair. 5 x 5 layers of width 4096 are 2 x 35 blocks of 128 MiB, 8.75 GiB; a joint map of five such
    layers copies its own, 3.1 GiB for each Gram. Where that is too much, use :func:`scans`.

    Args:
        store: Complete store.
        pairs: Of the models, all splits, mask applied.
        wanted: Layer pairs, all of these two models in this direction; joint ones too.
        seed: Of the shuffled control.
        device: Where products are made, see :func:`align.moments.device.multiplier`.
        target_gram: Whether to sum the Gram matrices of target layers. Without them ``gy`` is a diagonal, which is
            enough for all fits but those among the target's principal components.
        tick: Called with the number of pairs done since the last call.

    Raises:
        PairingError: Too few train or no validation pairs.
        LayerRangeError: A layer that the store does not hold.
        FitError: No layer pairs, pairs of other models, or a row that is not finite.
    """
    [found] = scans(store, pairs, wanted, seed=seed, memory=None, device=device, target_gram=target_gram, tick=tick)
    return found


def scans(
    store: Store,
    pairs: Pairs,
    wanted: Sequence[LayerPair],
    *,
    seed: int = 0,
    memory: int | None = MEMORY,
    device: str = "cpu",
    target_gram: bool = True,
    tick: Callable[[float], None] = lambda _: None,
) -> Iterator[dict[str, Scan]]:
    """What :func:`scan` finds, by groups of layer pairs that fit into memory: a pass over the rows for each.

    Args:
        store: Complete store.
        pairs: Of the models, all splits, mask applied.
        wanted: Layer pairs, all of these two models in this direction.
        seed: Of the shuffled control.
        memory: Bytes that the sums of one group may take; None for a single group. Sums alone count, not what fits
            make of them, and a caller that keeps the groups keeps all of them.
        device: Where products are made.
        target_gram: Whether to sum the Gram matrices of target layers.
        tick: Called with the number of pairs done since the last call, in all as many as are used.

    Yields:
        Scans by pair key, in the order of ``wanted``.

    Raises:
        PairingError: Too few train or no validation pairs.
        LayerRangeError: A layer that the store does not hold.
        FitError: No layer pairs, pairs of other models, or a row that is not finite.
        SpecError: Not even a single layer pair fits, or the device does not exist.
    """
    if not wanted:
        raise FitError("there are no layer pairs to scan; name some with --layers or --layer-map")
    for pair in wanted:
        if (pair.source, pair.target) != (pairs.source, pairs.target):
            raise FitError(f"{pair.key} is not of the pairs of {pairs.source} and {pairs.target}; scan them apart")
        for model, layer in sites_of(pair):
            store.layer(model, layer)
    train = pairs.where(pairs.split == TRAIN).need(MINIMUM_PAIRS, "training")
    val = pairs.where(pairs.split == VALIDATION).need(1, "validation")
    groups = list(groups_within(store, wanted, memory, target_gram=target_gram))
    multiply = multiplier(device)

    def count(rows: float) -> None:
        tick(rows / len(groups))

    for group in groups:
        sums = [_accumulate(store, part, group, multiply, count, target_gram=target_gram) for part in (train, val)]
        (origins, fit_blocks), (_, check_blocks) = sums
        shifts = {node: _shift_to_mean(fit_blocks[node, node]) for node in origins}
        for blocks, own_mean in ((fit_blocks, True), (check_blocks, False)):
            for x, y in blocks:
                blocks[x, y] = moved_block(blocks[x, y], shifts[x], shifts[y], centred=(own_mean, own_mean))
        origins = {node: origin + shifts[node] for node, origin in origins.items()}
        found = {}
        for pair in group:
            fit, check = (_moments(pair, origins, blocks.__getitem__) for blocks in (fit_blocks, check_blocks))
            own = _seed(seed, pair)
            found[pair.key] = Scan(fit, check, own, partial(exchanged, store, train, pair, fit, own))
        yield found


def _shift_to_mean(own: Block) -> Array:
    """From the origin of a node's rows to the mean of these."""
    shift: Array = own.x[0] / own.n
    return shift


def _seed(seed: int, pair: LayerPair) -> tuple[int, ...]:
    # Of its own for each layer pair: which others are scanned beside it makes no difference.
    return (seed, zlib.crc32(pair.key.encode()))


def _blocks(pair: LayerPair) -> list[_NodePair]:
    """The blocks that a layer pair's moments are assembled from."""
    sources, y = [("x", layer) for layer in pair.source_layers], ("y", pair.target_layer)
    if len(set(sources)) < len(sources):
        raise FitError(f"{pair.key} names a source layer twice, which makes its Gram singular; leave one out")
    # A model's layers among themselves, in one order only: pairs of layers are shared between joint maps.
    own = [(x, x) for x in sources] + list(combinations(sorted(sources), 2))
    return [*own, (y, y), *((x, y) for x in sources)]


def memory_of(store: Store, wanted: Sequence[LayerPair], *, target_gram: bool = True) -> int:
    """Bytes that the sums of some layer pairs take, train and validation together.

    Args:
        store: Any store.
        wanted: Layer pairs of two models in one direction.
        target_gram: Whether the Gram matrices of target layers are among them.
    """
    models = {"x": wanted[0].source, "y": wanted[0].target}
    blocks = {block for pair in wanted for block in _blocks(pair)}
    width = {side: store.model(model).width for side, model in models.items()}
    sums = sum(width[x] * width[y] for (x, _), (y, _) in blocks if target_gram or x == "x")
    # A joint map has copies of its own, end to end.
    joint = [(width["x"] * len(pair.source_layers)) for pair in wanted if len(pair.source_layers) > 1]
    return 2 * 8 * (sums + sum(d * (d + width["y"]) for d in joint))


def groups_within(
    store: Store, wanted: Sequence[LayerPair], memory: int | None, *, target_gram: bool = True
) -> Iterator[list[LayerPair]]:
    """Cut a list of layer pairs so that the sums of each part fit into memory.

    Args:
        store: Any store.
        wanted: Layer pairs of two models in one direction.
        memory: Bytes; None for one part.
        target_gram: Whether the Gram matrices of target layers are summed.

    Raises:
        SpecError: Not even a single layer pair fits.
    """
    group: list[LayerPair] = []
    for pair in wanted:
        if memory is not None and (least := memory_of(store, [pair], target_gram=target_gram)) > memory:
            raise SpecError(
                f"{pair.key} alone takes {human_bytes(least)}, more than the {human_bytes(memory)} allowed; "
                "raise --memory"
            )
        if group and memory is not None and memory_of(store, [*group, pair], target_gram=target_gram) > memory:
            yield group
            group = []
        group.append(pair)
    yield group


def _accumulate(
    store: Store,
    pairs: Pairs,
    wanted: Sequence[LayerPair],
    multiply: Multiply,
    tick: Callable[[float], None],
    *,
    target_gram: bool,
) -> tuple[dict[Node, Array], dict[_NodePair, Block]]:
    """One pass over the pairs of a split: the origins of all nodes and the blocks."""
    blocks = list(dict.fromkeys(block for pair in wanted for block in _blocks(pair)))
    models = {"x": pairs.source, "y": pairs.target}
    numbers = {"x": pairs.row_source, "y": pairs.row_target}
    nodes = dict.fromkeys(node for block in blocks for node in block)
    origins = {(side, layer): store.origin(models[side], layer) for side, layer in nodes}
    narrow = [] if target_gram else [node for node in nodes if node[0] == "y"]
    sums: BlockSums[Node] = BlockSums(origins, blocks, block_rows=kept.CUT_ROWS, diagonal=narrow, multiply=multiply)
    for start in range(0, len(pairs), kept.CUT_ROWS):
        cut = slice(start, min(start + kept.CUT_ROWS, len(pairs)))
        readers = {node: store.rows(models[node[0]], node[1]) for node in sums.nodes}
        sums.add({node: reader[numbers[node[0]][cut]] for node, reader in readers.items()})
        # Nobody comes by here again in this pass, and a store may be larger than memory.
        for reader in readers.values():
            reader.release()
        tick(cut.stop - cut.start)
    return sums.origins, sums.blocks()


def _moments(pair: LayerPair, origins: dict[Node, Array], block: Callable[[_NodePair], Block]) -> Moments:
    """Assemble the moments of a layer pair; Grams are shared between pairs, except those of joint maps.

    Args:
        pair: Which layers.
        origins: Of every node.
        block: Gives the block of two nodes, where layers of one side come in ascending order.
    """
    sources, y = [("x", layer) for layer in pair.source_layers], ("y", pair.target_layer)

    def either(one: Node, other: Node) -> Block:
        return block((one, other)) if one <= other else block((other, one)).swapped

    cross = end_to_end([block((x, y)) for x in sources])
    if len(sources) == 1:
        own = block((sources[0], sources[0]))
    else:
        columns = [end_to_end([either(one, other) for one in sources]).swapped for other in sources]
        own = end_to_end(columns)
    origin = origins[sources[0]] if len(sources) == 1 else np.concatenate([origins[x] for x in sources])
    return assemble(origin, origins[y], cross, own, block((y, y)))


def usable_moments(
    store: Store,
    models: tuple[str, str],
    wanted: Sequence[Sequence[Site]],
    *,
    policy: str = "end",
    keep_sinks: bool = False,
    roles: Collection[str] | None = None,
    max_rows: int | None = None,
) -> StoredMoments | None:
    """The store's own moments where they are sums over exactly the pairs asked for; None where a scan has to do.

    Args:
        store: Complete store.
        models: Whose pairs, source and target.
        wanted: Which layers with which: two of them, or all of a joint map, as :func:`sites_of` names them.
        policy: Pair policy.
        keep_sinks: Lift the sink mask.
        roles: Names of the roles of the pairs; None for all.
        max_rows: Pairs of the train split at most.

    Raises:
        StoreStateError: The stored moments do not answer, and there are no rows that would.
    """
    source, target = models
    stored = StoredMoments(store, source, target)
    reasons = {
        f"--policy {policy}": policy != "end",
        "--keep-sinks": keep_sinks,
        # Stored moments sum over all roles; nobody can take one out of a sum.
        f"--roles {','.join(roles or ())}": roles is not None,
        "--max-rows": max_rows is not None,
        f"aligning {source!r} with itself": source == target,
    }
    asked = next((words for words, applies in reasons.items() if applies), None)
    if asked is None and stored.covers([both for sites in wanted for both in combinations(sites, 2)]):
        return stored
    need_rows(store, wanted, asked or "a fit without moments of these pairs")
    return None


def roles_selected(store: Store, models: tuple[str, str], roles: Collection[str], selected: int) -> str:
    """One line on what ``--roles`` selects, and on what that costs.

    Args:
        store: Complete store.
        models: Whose pairs.
        roles: Names of the roles.
        selected: Pairs of these roles.
    """
    first, second = sorted(models, key=store.models.index)
    why = ", since stored moments sum over all roles" if store.has(f"moments/{first}__{second}") else ""
    return f"roles {', '.join(roles)}: {selected} pairs, whose rows are read{why}"


def need_rows(store: Store, wanted: Sequence[Sequence[Site]], what: str) -> None:
    """Refuse what only rows can answer where a store kept none.

    Args:
        store: Complete store.
        wanted: Which layers with which.
        what: What needs them, for the message.

    Raises:
        StoreStateError: A layer has no rows.
    """
    for model, layer in sorted({site for sites in wanted for site in sites}):
        if not has_rows(store, model, layer):
            raise StoreStateError(
                f"{what} needs rows, and {store.path} holds none of layer {layer} of {model!r}, only moments "
                "(policy end, sinks masked, all roles): fit a closed form to these, or extract again without "
                "--moments-only"
            )


def stored_scan(stored: StoredMoments, wanted: Sequence[LayerPair], *, seed: int = 0) -> dict[str, Scan]:
    """What :func:`scan` finds, from moments that the store keeps; Grams are shared between layer pairs, too.

    Args:
        stored: From :func:`usable_moments`.
        wanted: Layer pairs, all of these two models in either direction.
        seed: Of the shuffled control.

    Raises:
        PairingError: Too few train or no validation pairs.
        StoreStateError: The moments have gone meanwhile.
        FitError: No layer pairs.
    """
    if not wanted:
        raise FitError("there are no layer pairs to scan; name some with --layers or --layer-map")
    stored.pairs.where(stored.pairs.split == TRAIN).need(MINIMUM_PAIRS, "training")
    stored.pairs.where(stored.pairs.split == VALIDATION).need(1, "validation")
    about_means = _AboutMeans(stored)
    result = {}
    for pair in wanted:
        train, val = (about_means.moments(pair, split) for split in (TRAIN, VALIDATION))
        own = _seed(seed, pair)
        rows = stored.store.pairs(pair.source, pair.target).select(TRAIN)
        few = len(rows) <= EXCHANGED_ROWS and all(has_rows(stored.store, *site) for site in sites_of(pair))
        exchange = partial(exchanged, stored.store, rows, pair, train, own) if few else None
        result[pair.key] = Scan(train, val, own, exchange)
    return result


def sites_of(pair: LayerPair) -> tuple[Site, ...]:
    """A layer pair as stored moments name it: its source layers, and last its target layer.

    Args:
        pair: Which layers.
    """
    return (*((pair.source, layer) for layer in pair.source_layers), (pair.target, pair.target_layer))


def read_split(stored: StoredMoments, pair: LayerPair, split: int) -> Moments:
    """The stored moments of a layer pair.

    Args:
        stored: From :func:`usable_moments`.
        pair: Which layers.
        split: 0 train, 1 validation, 2 test.

    Raises:
        StoreStateError: There are none.
    """
    models = {"x": pair.source, "y": pair.target}

    def block(nodes: _NodePair) -> Block:
        one, other = ((models[side], layer) for side, layer in nodes)
        return _block(stored, pair, (one, other), split)

    return _moments(pair, {(side, k): stored.store.origin(models[side], k) for side, k in _nodes(pair)}, block)


def _nodes(pair: LayerPair) -> list[Node]:
    return list(dict.fromkeys(node for both in _blocks(pair) for node in both))


def _block(stored: StoredMoments, pair: LayerPair, sites: SitePair, split: int) -> Block:
    if not stored.covers([sites], [split]):
        raise StoreStateError(f"{stored.store.path} holds no moments of {pair.key}; make them with `featstore moments`")
    return stored.block(sites, split)


class _AboutMeans:
    """Stored moments about the train means; what belongs to a single layer, layer pairs have in common."""

    def __init__(self, stored: StoredMoments) -> None:
        self._stored = stored
        self._shifts: dict[Site, Array] = {}
        self._shared: dict[tuple[SitePair, int], Block] = {}

    def moments(self, pair: LayerPair, split: int) -> Moments:
        """Of a layer pair and a split; the train split first."""
        models = {"x": pair.source, "y": pair.target}

        def block(nodes: _NodePair) -> Block:
            one, other = ((models[side], layer) for side, layer in nodes)
            return self._moved(pair, (one, other), split)

        sites = {(side, layer): (models[side], layer) for side, layer in _nodes(pair)}
        for site in sites.values():
            self._moved(pair, (site, site), TRAIN)
        origins = {node: self._stored.store.origin(*site) + self._shifts[site] for node, site in sites.items()}
        return _moments(pair, origins, block)

    def _moved(self, pair: LayerPair, sites: SitePair, split: int) -> Block:
        one, other = sites
        if (sites, split) in self._shared:
            return self._shared[sites, split]
        found = _block(self._stored, pair, sites, split)
        if one == other and split == TRAIN:
            self._shifts[one] = _shift_to_mean(found)
        own_mean = split == TRAIN
        moved = moved_block(
            # The store's own array may be mapped, and is not ours to change.
            replace(found, product=found.product.copy()),
            self._shifts[one],
            self._shifts[other],
            centred=(own_mean, own_mean),
        )
        if one == other:
            self._shared[sites, split] = moved
        return moved
