"""Teacher-forced stitched loss: how well the target predicts text when a layer's states come from the source.

The source states are the store's; only the target is loaded (and, where it is to be scored by itself, afterwards the
source). Every condition replaces the same positions of the same windows, and the loss is over the predictions of the
third token on, summed by document.

Roles select which predictions are scored. States are put in at all positions all the same: a prediction of the
assistant's text rests on the whole text before it, and the question is what it is worth when that came from the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.judging.table import JUDGED
from align.maps.fitted import Adapter, Aligner
from align.tokens.table import TokenTable
from evaluate.injection.controls import CONTROLS, control_states, token_table
from evaluate.injection.loading import Loaded, Models, check_card, choose
from evaluate.injection.verified import leak_at, recorded, start_token
from evaluate.injection.wire import Rows, Wire, wire
from evaluate.stitching.conditions import Group, PutIn, last_part, together
from evaluate.stitching.figures import alone, compared, figures, size
from evaluate.stitching.findings import findings
from evaluate.stitching.predictions import Figures
from evaluate.stitching.scores import (
    BYTES,
    DIVERGENCE,
    FIRST_SCORED,
    NATS,
    SAME,
    TOKENS,
    Scored,
    Tally,
    add_compared,
    add_untouched,
    add_window,
)
from evaluate.stitching.windows import Window, scored_windows
from evaluate.stitching.words import describe
from featstore.errors import AdapterError, SpecError
from featstore.models.devices import DeviceMap
from featstore.models.injection import KEEP
from featstore.models.probe.prove import Needs
from featstore.models.references import NOTHING, Allowed
from featstore.models.tail import Tail, Whole
from featstore.runtime.console import progress
from featstore.store import Store
from featstore.text.roles import role_names
from featstore.text.splits import SPLITS, TEST
from featstore.text.tokens import TokenizedWindow

__all__ = ["CONDITIONS", "describe", "measure", "stitch"]

CONDITIONS = ("clean", "self", "mapped", *CONTROLS)


def _refuse_another_store(adapter: Adapter, store: Store) -> None:
    """A store that was rebuilt is the same one only where that changed nothing that a fit or a score reads."""
    fitted = adapter.card["store"]["fingerprint"]
    if fitted == store.fingerprint:
        return
    since = store.rebuilt_since(fitted)
    if since is None:
        raise AdapterError(
            f"the run in {adapter.directory} was fitted from a store with fingerprint {fitted[:12]}, {store.path} "
            f"has {store.fingerprint[:12]}; use the store named in its card"
        )
    if since:
        raise AdapterError(
            f"the run in {adapter.directory} was fitted before {store.path} was rebuilt, over other pairs than "
            "it has now; fit it again with `align train`"
        )


def stitch(store: Store, adapter: Adapter, **options: Any) -> dict[str, Any]:
    """The contents of ``stitch.json`` alone.

    Args:
        store: As of :func:`measure`.
        adapter: As there.
        options: As there.

    Raises:
        FeatstoreError: As there.
    """
    return measure(store, adapter, **options)[0]


def measure(
    store: Store,
    adapter: Adapter,
    *,
    layers: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    split: int = TEST,
    max_tokens: int | None = None,
    keep: str = "own",
    roles: str | Iterable[str] | None = None,
    source_alone: bool = False,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    tokens: Mapping[str, TokenTable | str] | None = None,
    models: Mapping[str, Loaded] | None = None,
    allow_side_channel: bool = False,
    allowed: Allowed = NOTHING,
    quiet: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stitched loss of every map of a run, with controls and intervals.

    Args:
        store: The store the run was fitted from.
        adapter: The maps of the run.
        layers: Source layers, None for all.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        device_map: Where the modules of models go, instead of one device.
        split: Which documents.
        max_tokens: Target tokens at most, None for all.
        keep: What the blocks from the layer on read of positions that take no state: ``own``, the target's own states
            there, or ``hide``, nothing (the start token excepted). Under ``hide`` the ``self`` condition is what the
            hiding alone does, and no longer equal to ``clean``.
        roles: Roles of the tokens that are scored, or ``all``; None for those that the run was fitted to. States are
            put in at all positions.
        source_alone: Score the source model by itself on its own tokens of the same windows; it is loaded after the
            target is released.
        controls: Which of :data:`evaluate.injection.controls.CONTROLS`, ``mean`` among them: each is a pass over
            the text.
        seed: Of the random controls.
        tokens: By layer pair what is predicted from the source's token alone, or why nothing is; None for what the run
            directory has.
        models: The run's models where they are loaded already.
        allow_side_channel: Whether layers are taken that leak past the stream; the leak stands beside the figures.
        allowed: Whether models are loaded that the card names and the user has not, and pickled weights read.
        quiet: No progress.

    Returns:
        The contents of ``stitch.json``, and of ``stitch_documents.json``.

    Raises:
        AdapterError: The run was fitted from another store, does not fit a model, or is damaged.
        ModelLoadError: A model is not at hand.
        PairingError: As :func:`evaluate.stitching.windows.scored_windows`.
        StrangeReferenceError: The card names a model that the user has not named.
        ProbeError: A layer has a side channel, or ``hide`` does not hide there.
        SpecError: No such layer, or ``keep`` or a role is unknown.
    """
    scored_roles = role_names(adapter.card.get("roles") if roles is None else roles)
    if keep not in KEEP:
        raise SpecError(f"--keep {keep}: choose one of {', '.join(KEEP)}")
    if "mean" not in controls or set(controls) - set(CONTROLS):
        raise SpecError(f"controls {', '.join(controls)}: choose mean and any of {', '.join(CONTROLS)}")
    check_card(adapter)
    chosen = choose(adapter, layers)
    _refuse_another_store(adapter, store)
    runs = []
    for source, target in dict.fromkeys((a.pair.source, a.pair.target) for a in chosen):
        wires = [wire(adapter, a) for a in chosen if (a.pair.source, a.pair.target) == (source, target)]
        windows = scored_windows(store, source, target, split=split, max_tokens=max_tokens, roles=scored_roles)
        tables = {
            w.aligner.pair.key: token_table(adapter, w.aligner) if tokens is None else tokens[w.aligner.pair.key]
            for w in wires
        }
        runs.append(_Stitcher(store, windows, wires, tables, keep=keep, controls=controls, seed=seed))
    sources = [run.source for run in runs] if source_alone else []
    # The second model is known to fit before the first one has worked for an hour.
    names = [*(run.target for run in runs), *sources]
    needs: dict[str, Needs] = {}
    for a in chosen:
        before = needs.get(a.pair.target, Needs())
        needs[a.pair.target] = Needs(layers=(*before.layers, a.pair.target_layer), hide=keep == "hide")
    needed = Models(
        adapter,
        names,
        overrides,
        device=device,
        dtype=dtype,
        device_map=device_map,
        quiet=quiet,
        given=models,
        needs=needs,
        allow_side_channel=allow_side_channel,
        allowed=allowed,
    )
    verified: dict[str, Any] = {}
    starts: dict[str, Any] = {}
    # A model is loaded once, does all it is needed for, and is released before the next.
    for name in needed.names:
        loaded = needed.load(name)
        verified[name] = recorded(loaded, needs.get(name, Needs()))
        if keep == "hide" and name in needs:
            starts[name] = start_token(loaded)
        for run in runs:
            if run.target == name:
                with progress(f"stitch {run.source}->{name}", run.work, "tok", quiet=quiet) as tick:
                    for done in run.stitched(loaded):
                        tick(done)
            if run.source == name and source_alone:
                work = sum(len(w.source.ids) for w in run.windows)
                with progress(f"{name} alone", work, "tok", quiet=quiet) as tick:
                    for done in run.alone(loaded):
                        tick(done)
        del loaded
        needed.freed()
    stitched = {
        "adapter_type": adapter.card["type"],
        "judged": JUDGED,
        "split": SPLITS[split],
        "keep": keep,
        "roles": None if scored_roles is None else list(scored_roles),
        "seed": seed,
        "pairs": {w.aligner.pair.key: _judged(run.entry(w), w, verified) for run in runs for w in run.wires},
        "verified": verified,
        **({"start": starts} if starts else {}),
    }
    sums = {w.aligner.pair.key: run.documents(w) for run in runs for w in run.wires}
    return stitched, {"split": SPLITS[split], "pairs": sums}


class _Stitcher:
    """Runs windows of one direction through the target under every condition and adds up the losses."""

    def __init__(
        self,
        store: Store,
        windows: Sequence[Window],
        wires: Sequence[Wire],
        tokens: Mapping[str, TokenTable | str],
        *,
        keep: str,
        controls: Sequence[str],
        seed: int,
    ) -> None:
        self.windows, self.wires, self._tokens, self._controls = windows, wires, tokens, controls
        self.source, self.target = wires[0].aligner.pair.source, wires[0].aligner.pair.target
        self._store, self._keep, self._seed = store, keep, seed
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._reasons: dict[str, dict[str, str]] = {}
        self._identical: dict[str, bool] = {}
        self._source_tally = Tally()

    @property
    def work(self) -> int:
        """Target tokens of all passes."""
        return sum(len(w.target.ids) for w in self.windows) * self._passes

    @property
    def _passes(self) -> int:
        # Under `hide` one more, without it: only there must the target's own states give its own logits.
        return 1 + len(self.wires) * (2 + len(self._controls) + (self._keep == "hide"))

    @torch.inference_mode()
    def stitched(self, target: Loaded) -> Iterator[int]:
        """Run all windows under all conditions, yielding target tokens done."""
        tail = last_part(target, self.windows[0])
        for numbers in together(target, self.windows):
            self._together(target, tail, numbers)
            for at in numbers:
                yield len(self.windows[at].target.ids) * self._passes

    @torch.inference_mode()
    def alone(self, source: Loaded) -> Iterator[int]:
        """Run all windows through the source by itself, yielding its tokens done."""
        for window in self.windows:
            if len(window.source.ids) > FIRST_SCORED:
                logits = source.model(input_ids=_ids(window.source, source), use_cache=False).logits[0]
                add_window(self._source_tally, window.document, window.source, logits, counts=window.source_counts)
            yield len(window.source.ids)

    def _together(self, target: Loaded, tail: Tail | Whole, numbers: Sequence[int]) -> None:
        """Run some windows through the target under all conditions."""
        windows = [self.windows[at] for at in numbers]
        layers: dict[int, list[Wire]] = {}
        for to in self.wires:
            layers.setdefault(to.aligner.pair.target_layer, []).append(to)
        group = Group(target, tail, windows, list(layers))
        for layer, wires in layers.items():
            keys = [to.aligner.pair.key for to in wires]
            for row, own in enumerate(group.untouched):
                for key in keys:
                    self._tally(key, "clean", windows[row], group.scored[row], own.nats)
            self._put_back(group, layer, keys, windows)
            # Conditions of several maps that put in the same, such as zeros, are one.
            given: dict[tuple[int, bytes], tuple[PutIn, list[tuple[str, str]]]] = {}
            for row, at in enumerate(numbers):
                for to, key in zip(wires, keys, strict=True):
                    for name, value in self._states(at, windows[row], to, group.own_states(row, layer)).items():
                        if isinstance(value, str):
                            self._reasons.setdefault(key, {})[name] = value
                        elif name != "self":
                            what = (row, np.asarray(value).tobytes())
                            given.setdefault(what, (PutIn(row, value), []))[1].append((key, name))
            figures = group.put_in(layer, [put for put, _ in given.values()], self._keep)
            for (put, names), found in zip(given.values(), figures, strict=True):
                for key, name in names:
                    self._tally(key, name, windows[put.window], group.scored[put.window], found)

    def _put_back(self, group: Group, layer: int, keys: Sequence[str], windows: Sequence[Window]) -> None:
        """The target's own states, which are the same for all maps of a layer."""
        figures, exact = group.put_back(layer, self._keep)
        if self._keep != "own":
            _, exact = group.put_back(layer, "own")
        for key in keys:
            for row, found in enumerate(figures):
                self._tally(key, "self", windows[row], group.scored[row], found)
                self._identical[key] = self._identical.get(key, True) and exact[row]

    def _tally(
        self, key: str, condition: str, window: Window, part: Scored, found: Figures | NDArray[np.float64]
    ) -> None:
        tally = self._tallies.setdefault((key, condition), Tally())
        if isinstance(found, tuple):
            add_compared(tally, window.document, part, found)
        else:
            add_untouched(tally, window.document, part, found)

    def _states(self, at: int, window: Window, to: Wire, own: torch.Tensor) -> dict[str, Rows | torch.Tensor | str]:
        """The states of every condition at the window's places, or why a condition has none."""
        rng = np.random.default_rng((self._seed, at))
        aligner, places = to.aligner, window.places
        rows = self._rows(window, aligner)
        mapped, source = to.states(rows, window), rows[window.taken[places]]
        other, other_mapped = self._elsewhere(window, to, len(places), rng)
        table = self._tokens[aligner.pair.key]
        token = table if isinstance(table, str) else table.predict(window.source.ids[window.taken[places]])
        states: dict[str, Rows | torch.Tensor | str] = {"self": own, "mapped": mapped}
        for name in self._controls:
            states[name] = control_states(
                name, aligner, source, other, rng, self._seed, mapped=mapped, other_mapped=other_mapped, predicted=token
            )
        return states

    def _rows(self, window: Window, aligner: Aligner, numbers: NDArray[np.int64] | None = None) -> Rows:
        """The stored source states of a window, or those of some rows of the store."""
        wanted = slice(window.source_row, window.source_row + len(window.source.ids)) if numbers is None else numbers
        pair = aligner.pair
        layers = [self._store.rows(pair.source, layer)[wanted] for layer in pair.source_layers]
        return np.concatenate(layers, axis=1)

    def _elsewhere(
        self, window: Window, to: Wire, count: int, rng: np.random.Generator
    ) -> tuple[Rows | None, Rows | None]:
        """States of other documents: those of the source for a map of rows, mapped ones for a map of windows."""
        others = [w for w in self.windows if w.document != window.document and len(w.places)]
        if not others:
            return None, None
        if to.aligner.takes_rows:
            pool = np.concatenate([w.source_row + w.taken[w.places] for w in others])
            return self._rows(window, to.aligner, rng.choice(pool, count)), None
        # One other window: what the map makes of it is known only once all of it is read.
        other = others[int(rng.integers(len(others)))]
        mapped = to.states(self._rows(other, to.aligner), other)
        return None, mapped[rng.integers(len(mapped), size=count)]

    def entry(self, to: Wire) -> dict[str, Any]:
        """The pair's part of ``stitch.json``, less what was tested on its target."""
        key, pair = to.aligner.pair.key, to.aligner.pair
        tables = {name: tally.table() for name, tally in self._by_condition(key).items()}
        ordinary = sum(int((~w.target.special).sum()) for w in self.windows)
        replaced = sum(len(w.places) for w in self.windows)
        lacking = self._reasons.get(key, {}) | {
            name: "not asked for" for name in CONTROLS if name not in self._controls
        }
        # Raw states are no control where widths differ, nor of a model against itself, of which they are the truth.
        no_raw = pair.source == pair.target or "raw" in self._reasons.get(key, {})
        rivals = [name for name in CONTROLS if not (name == "raw" and no_raw)]
        judged, reasons = compared(tables, rivals, lacking)
        entry: dict[str, Any] = {
            **size(tables["clean"]),
            "replaced_share": replaced / max(ordinary, 1),
            "self_bit_identical": self._identical[key],
            "conditions": {
                name: figures(tables[name], tables["mean"]) if name in tables else None for name in CONDITIONS
            },
            "reasons": lacking | reasons,
            **judged,
        }
        by_itself = self._source_tally.table() if self._source_tally.sums else None
        entry["alone"] = {"source": None if by_itself is None else alone(by_itself), "target": alone(tables["clean"])}
        if (rate := to.rate([w.size for w in self.windows])) is not None:
            entry["rate"] = rate
        return entry

    def documents(self, to: Wire) -> dict[str, Any]:
        """The pair's part of ``stitch_documents.json``."""
        tallies = self._by_condition(to.aligner.pair.key)
        tables = {name: tally.table() for name, tally in tallies.items()}
        clean = tables["clean"]
        return {
            "documents": tallies["clean"].documents,
            "tokens": _whole(clean[:, TOKENS]),
            "bytes": _whole(clean[:, BYTES]),
            "nats": {name: table[:, NATS].tolist() for name, table in tables.items()},
            "kl": {name: table[:, DIVERGENCE].tolist() for name, table in tables.items()},
            "same": {name: _whole(table[:, SAME]) for name, table in tables.items()},
        }

    def _by_condition(self, key: str) -> dict[str, Tally]:
        return {name: self._tallies[key, name] for name in CONDITIONS if (key, name) in self._tallies}


def _whole(sums: NDArray[np.float64]) -> list[int]:
    return [int(value) for value in sums]


def _judged(entry: dict[str, Any], to: Wire, verified: Mapping[str, Any]) -> dict[str, Any]:
    """The pair's figures with what stands beside them: the leak at the target's layer, and what limits them."""
    pair = to.aligner.pair
    leak = leak_at(verified, pair.target, pair.target_layer)
    entry = entry | {"leak": leak}
    return entry | {"warnings": list(findings(pair.key, entry))}


def _ids(tokens: TokenizedWindow, model: Loaded) -> torch.Tensor:
    return torch.from_numpy(tokens.ids.astype(np.int64))[None].to(model.device)
