"""Teacher-forced stitched loss: how well the target predicts text when a layer's states come from the source.

The source states are the store's; only the target is loaded. Every condition replaces the same positions of the same
windows, and the loss is over the predictions of the third token on. Intervals resample documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.aligners import Adapter, Aligner
from align.metrics import document_bootstrap
from evaluate.controls import CONTROLS, control_states
from evaluate.inject import injecting, source_positions
from evaluate.loading import Loaded, choose, load
from featstore import sites
from featstore.console import progress
from featstore.corpus import SPLITS, TEST
from featstore.errors import AdapterError, PairingError
from featstore.store import Store
from featstore.tokens import TokenizedWindow

CONDITIONS = ("clean", "self", "mapped", *CONTROLS)
_FIRST_SCORED = 2


@dataclass(frozen=True)
class Window:
    """One test window under both tokenizers.

    Attributes:
        document: Document number.
        source: Source tokens.
        target: Target tokens.
        source_row: First source row in the store.
        taken: Per target position the source position whose state it takes, -1 for its own.
    """

    document: int
    source: TokenizedWindow
    target: TokenizedWindow
    source_row: int
    taken: NDArray[np.int64]


@dataclass
class Tally:
    """Sums by document: nats, tokens, bytes."""

    sums: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, document: int, nats: float, tokens: int, size: int) -> None:
        """Add a window.

        Args:
            document: Document number.
            nats: Summed loss.
            tokens: Scored tokens.
            size: Bytes those tokens span.
        """
        self.sums[document] = self.sums.get(document, np.zeros(3)) + np.array([nats, tokens, size])

    def table(self) -> NDArray[np.float64]:
        """``(documents, 3)`` in document order."""
        return np.stack([self.sums[d] for d in sorted(self.sums)])


def scored_windows(
    store: Store, source: str, target: str, *, split: int = TEST, max_tokens: int | None = None
) -> list[Window]:
    """Windows of a split with their position maps, whole windows up to a budget, round-robin over documents.

    Args:
        store: Complete store.
        source: Model name.
        target: Model name.
        split: 0 train, 1 validation, 2 test.
        max_tokens: Target tokens at most; at least one window is returned.

    Raises:
        PairingError: The split has no window with a scored token.
    """
    table_a, table_b = store.tokens(source), store.tokens(target)
    corpus = store.corpus
    numbers = np.flatnonzero(corpus.window_split == split)
    # One window of every document before the second of any: the interval comes from documents.
    order_within = np.zeros(len(numbers), dtype=np.int64)
    seen: dict[int, int] = {}
    for i, w in enumerate(numbers):
        document = int(corpus.window_document[w])
        order_within[i] = seen[document] = seen.get(document, -1) + 1
    chosen: list[Window] = []
    total = 0
    for w in numbers[np.argsort(order_within, kind="stable")]:
        a, b = (slice(*np.searchsorted(t.window, [w, w + 1])) for t in (table_a, table_b))
        if b.stop - b.start <= _FIRST_SCORED:
            continue
        if chosen and max_tokens is not None and total + (b.stop - b.start) > max_tokens:
            break
        first = TokenizedWindow(table_a.id[a], table_a.byte_end[a], table_a.special[a])
        second = TokenizedWindow(table_b.id[b], table_b.byte_end[b], table_b.special[b])
        taken = source_positions(first, second)
        sink_a, sink_b = table_a.sink[a], table_b.sink[b]
        taken[sink_b | ((taken >= 0) & sink_a[np.maximum(taken, 0)])] = -1
        chosen.append(Window(int(corpus.window_document[w]), first, second, int(a.start), taken))
        total += b.stop - b.start
    if not chosen:
        raise PairingError(f"the {SPLITS[split]} split of {store.path} has no window to score; extract more documents")
    return chosen


def stitch(
    store: Store,
    adapter: Adapter,
    *,
    layers: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    split: int = TEST,
    max_tokens: int | None = None,
    seed: int = 0,
    models: Mapping[str, Loaded] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Stitched loss of every map of a run, with controls and intervals.

    Args:
        store: The store the run was fitted from.
        adapter: The run's adapter.
        layers: Source layers, None for all.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        split: Which documents.
        max_tokens: Target tokens at most, None for all.
        seed: Of the random controls.
        models: The run's models where they are loaded already.
        quiet: No progress.

    Returns:
        The contents of ``stitch.json``.

    Raises:
        AdapterError: The adapter was fitted from another store, or does not fit the model.
    """
    if adapter.card["store"]["fingerprint"] != store.fingerprint:
        raise AdapterError(
            f"the adapter in {adapter.directory} was fitted from a store with fingerprint "
            f"{adapter.card['store']['fingerprint'][:12]}, {store.path} has {store.fingerprint[:12]}; "
            "use the store named in its card"
        )
    chosen = choose(adapter, layers)
    result: dict[str, Any] = {
        "adapter_type": adapter.card["type"],
        "split": SPLITS[split],
        "keep": "own",
        "seed": seed,
        "pairs": {},
    }
    for source, target in dict.fromkeys((a.pair.source, a.pair.target) for a in chosen):
        aligners = [a for a in chosen if (a.pair.source, a.pair.target) == (source, target)]
        windows = scored_windows(store, source, target, split=split, max_tokens=max_tokens)
        at_hand = (models or {}).get(target)
        loaded = at_hand or load(adapter, target, overrides, device=device, dtype=dtype, quiet=quiet)
        work = sum(len(w.target.ids) for w in windows) * (1 + len(aligners) * (len(CONDITIONS) - 1))
        with progress(f"stitch {source}->{target}", work, "tok", quiet=quiet) as tick:
            run = _Stitcher(store, loaded, windows, seed)
            for at, window in enumerate(windows):
                run.window(at, window, aligners)
                tick(len(window.target.ids) * (1 + len(aligners) * (len(CONDITIONS) - 1)))
        for aligner in aligners:
            result["pairs"][aligner.pair.key] = run.entry(aligner)
    return result


class _Stitcher:
    """Runs windows through the target under every condition and adds up the losses."""

    def __init__(self, store: Store, target: Loaded, windows: Sequence[Window], seed: int) -> None:
        self._store, self._target, self._windows, self._seed = store, target, windows, seed
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._reasons: dict[str, dict[str, str]] = {}
        self._identical: dict[str, bool] = {}

    @torch.inference_mode()
    def window(self, at: int, window: Window, aligners: Sequence[Aligner]) -> None:
        target = self._target
        ids = torch.from_numpy(window.target.ids.astype(np.int64))[None].to(target.device)
        own, clean = self._clean(ids, {a.pair.target_layer for a in aligners})
        places = np.flatnonzero(window.taken >= 0)
        for aligner in aligners:
            key, layer = aligner.pair.key, aligner.pair.target_layer
            self._score(key, "clean", window, clean)
            rng = np.random.default_rng((self._seed, at))
            source, other = self._source_rows(window, aligner, places, rng)
            states: dict[str, NDArray[np.float32] | torch.Tensor | str] = {
                "self": own[layer][0, places],
                "mapped": aligner.apply(source),
            }
            for name in CONTROLS:
                states[name] = control_states(name, aligner, source, other, rng, self._seed)
            for name, value in states.items():
                if isinstance(value, str):
                    self._reasons.setdefault(key, {})[name] = value
                    continue
                hidden = own[layer].clone()
                new = torch.as_tensor(value)
                hidden[0, places] = new.to(hidden.device, hidden.dtype)
                with injecting(target.stream, layer, hidden, whole=True):
                    logits = target.model(input_ids=ids, use_cache=False).logits[0]
                if name == "self":
                    same = bool(torch.equal(logits, clean))
                    self._identical[key] = self._identical.get(key, True) and same
                self._score(key, name, window, logits)

    def _clean(self, ids: torch.Tensor, layers: set[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        from contextlib import ExitStack

        own: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> sites.SiteFunction:
            def look(hidden: torch.Tensor) -> None:
                own[layer] = hidden

            return look

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(sites.at_site(self._target.stream, layer, keep(layer)))
            logits = self._target.model(input_ids=ids, use_cache=False).logits[0]
        return own, logits

    def _source_rows(
        self, window: Window, aligner: Aligner, places: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        pair = aligner.pair
        layers = [self._store.rows(pair.source, layer) for layer in pair.source_layers]

        def rows(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
            return np.concatenate([layer[numbers] for layer in layers], axis=1)

        source = rows(window.source_row + window.taken[places])
        others = [w for w in self._windows if w.document != window.document]
        if not others:
            return source, None
        pool = np.concatenate([w.source_row + w.taken[w.taken >= 0] for w in others])
        return source, rows(rng.choice(pool, len(places))) if len(pool) else None

    def _score(self, key: str, condition: str, window: Window, logits: torch.Tensor) -> None:
        ids = torch.from_numpy(window.target.ids.astype(np.int64)).to(logits.device)
        losses = torch.nn.functional.cross_entropy(
            logits[_FIRST_SCORED - 1 : -1].float(), ids[_FIRST_SCORED:], reduction="none"
        )
        scored = ~window.target.special[_FIRST_SCORED:]
        ends = window.target.byte_end
        size = int(ends[_FIRST_SCORED:][scored].max(initial=0)) - int(ends[_FIRST_SCORED - 1])
        nats = float(losses.double().cpu().numpy()[scored].sum())
        self._tallies.setdefault((key, condition), Tally()).add(window.document, nats, int(scored.sum()), max(size, 0))

    def entry(self, aligner: Aligner) -> dict[str, Any]:
        """The pair's part of ``stitch.json``."""
        key = aligner.pair.key
        tables = {name: self._tallies[key, name].table() for name in CONDITIONS if (key, name) in self._tallies}
        ordinary = sum(int((~w.target.special).sum()) for w in self._windows)
        replaced = sum(int((w.taken >= 0).sum()) for w in self._windows)
        entry: dict[str, Any] = {
            "n_documents": len(tables["clean"]),
            "n_tokens": int(tables["clean"][:, 1].sum()),
            "replaced_share": replaced / max(ordinary, 1),
            "self_bit_identical": self._identical[key],
            "conditions": {name: _figures(tables[name]) if name in tables else None for name in CONDITIONS},
            "reasons": self._reasons.get(key, {}),
        }
        same_model = aligner.pair.source == aligner.pair.target
        controls = [name for name in CONTROLS if name in tables and not (same_model and name == "raw")]
        best = min(controls, key=lambda name: entry["conditions"][name]["nats_per_token"])
        entry["recovered"] = _recovered(tables, "mean")
        entry["recovered_best_control"] = {"control": best, **_recovered(tables, best)}
        return entry


def _figures(table: NDArray[np.float64]) -> dict[str, Any]:
    nats, tokens, size = table.sum(axis=0)
    return {
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / np.log(2) / size if size else None,
        "ci95": list(document_bootstrap(table, (0, 1))),
    }


def _recovered(tables: dict[str, NDArray[np.float64]], control: str) -> dict[str, Any]:
    """(control - mapped) / (control - clean) with its interval; null where the control does no harm."""
    joined = np.concatenate([tables[name][:, :1] for name in (control, "mapped", "clean")], axis=1)

    def share(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        worst, mapped, clean = totals.T
        with np.errstate(divide="ignore", invalid="ignore"):
            result: NDArray[np.float64] = np.where(worst > clean, (worst - mapped) / (worst - clean), np.nan)
        return result

    value = float(share(joined.sum(axis=0, keepdims=True))[0])
    return {"value": value, "ci95": list(document_bootstrap(joined, share))}


def describe(result: dict[str, Any]) -> str:
    """The losses as lines for people.

    Args:
        result: From :func:`stitch`.
    """
    lines = []
    for key, entry in result["pairs"].items():
        lines.append(
            f"{key}: {entry['n_tokens']} tokens of {entry['n_documents']} documents, "
            f"{entry['replaced_share']:.0%} of positions replaced"
        )
        for name, figures in entry["conditions"].items():
            if figures is None:
                lines.append(f"  {name:16} -  ({entry['reasons'].get(name, 'not run')})")
            else:
                nats, bits = figures["nats_per_token"], figures["bits_per_byte"]
                lines.append(
                    f"  {name:16} {_number(nats, '7.3f')} nats/token {_interval(figures['ci95'], '.2f')}"
                    f"  {_number(bits, '6.3f')} bits/byte"
                )
        best = entry["recovered_best_control"]
        for name, block in (("mean", entry["recovered"]), (best["control"], best)):
            lines.append(
                f"  recovered {_number(block['value'], '6.1%')} against {name} {_interval(block['ci95'], '.1%')}"
            )
        if not entry["self_bit_identical"]:
            lines.append("  warning: self-injection changed the logits; do not trust these figures")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(ci: Sequence[float | None], form: str) -> str:
    return f"[{', '.join(_number(value, form) for value in ci)}]"
