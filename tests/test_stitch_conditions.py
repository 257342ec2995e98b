"""What every condition of a stitched run puts at a window's places: from which rows of the store, and by which seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.aligners import Adapter, load_adapter
from align.settings import Settings
from align.train import train
from evaluate.controls import CONTROLS
from evaluate.stitch import Window, _Stitcher, scored_windows
from evaluate.wire import Rows, wire
from featstore.store import Store, open_store

KEY, LAYERS = "llama:2->mistral:2", (2, 2)


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("conditions") / "run"
    train(Settings(str(tiny_store), "affine", layers="2"), directory, quiet=True)
    adapter, store = load_adapter(directory), open_store(tiny_store)
    # The training documents: there are more of them.
    windows = scored_windows(store, "llama", "mistral", split=0, max_tokens=2500)
    assert len({w.document for w in windows}) > 2
    return SimpleNamespace(adapter=adapter, store=store, windows=windows)


def stitcher(run: SimpleNamespace, to: Any = None, *, seed: int = 0, windows: list[Window] | None = None) -> Any:
    to = to or wire(run.adapter, run.adapter.aligners[KEY])
    given = run.windows if windows is None else windows
    return SimpleNamespace(to=to, inner=_Stitcher(run.store, given, [to], keep="own", controls=CONTROLS, seed=seed))


def states(run: SimpleNamespace, at: int, **options: Any) -> dict[str, Any]:
    made = stitcher(run, **options)
    window = run.windows[at]
    own = torch.zeros(len(window.places), 32)
    found: dict[str, Any] = made.inner._states(at, window, made.to, own)
    assert found["self"] is own
    assert list(found) == ["self", "mapped", *CONTROLS]
    return found


def source_rows(store: Store, window: Window, layer: int = LAYERS[0]) -> Rows:
    """The source states that a window's places take, one by one from the store."""
    everything = store.rows("llama", layer)[:]
    return np.stack([everything[window.source_row + window.taken[place]] for place in window.places])


def test_mapped_states_are_those_of_the_tokens_that_the_places_take(run: SimpleNamespace) -> None:
    aligner = run.adapter.aligners[KEY]
    for at, window in enumerate(run.windows[:4]):
        expected = aligner.apply(source_rows(run.store, window))
        np.testing.assert_allclose(states(run, at)["mapped"], expected, atol=1e-5)
        # The tokens are those of the window's text: what the store has there says so.
        tokens = run.store.tokens("llama")
        assert tokens.id[window.source_row : window.source_row + len(window.source.ids)].tolist() == list(
            window.source.ids
        )


def test_shuffled_states_are_ordinary_ones_of_other_documents_of_the_split(run: SimpleNamespace) -> None:
    aligner = run.adapter.aligners[KEY]
    rows = [aligner.apply(source_rows(run.store, window)) for window in run.windows]
    for at, window in enumerate(run.windows[:4]):
        shuffled = states(run, at)["shuffled"]
        others = [
            (w.document, row) for w, part in zip(run.windows, rows, strict=True) for row in part if w is not window
        ]
        pool = np.stack([row for _, row in others])
        nearest = np.abs(shuffled[:, None] - pool[None]).max(axis=2)
        assert (nearest.min(axis=1) < 1e-4).all()
        drawn = nearest.argmin(axis=1)
        assert window.document not in {others[i][0] for i in drawn}
        # Drawn from all over them, not from the first.
        assert len({others[i][0] for i in drawn}) > 1
        assert len(set(drawn)) > len(drawn) / 2


def test_the_seed_and_the_window_fix_what_is_drawn(run: SimpleNamespace) -> None:
    first, again, other = states(run, 0), states(run, 0), states(run, 0, seed=1)
    for name in CONTROLS:
        if isinstance(first[name], str):
            continue
        np.testing.assert_array_equal(first[name], again[name])
        assert np.array_equal(first[name], other[name]) == (name in ("mean", "zero")), name
    # Another window draws other vectors, and is turned by the same rotation.
    next_one = states(run, 1)
    n = min(len(first["random_norm"]), len(next_one["random_norm"]))
    one, two = (x["random_norm"][:n] / np.linalg.norm(x["random_norm"][:n], axis=1)[:, None] for x in (first, next_one))
    assert np.abs((one * two).sum(axis=1)).max() < 0.99
    turned = [
        np.linalg.lstsq(
            source_rows(run.store, run.windows[at]) - run.adapter.aligners[KEY].tensors["control_mean_source"],
            found["random_rotation"] - run.adapter.aligners[KEY].tensors["control_mean"],
            rcond=None,
        )[0]
        for at, found in ((0, first), (1, next_one))
    ]
    np.testing.assert_allclose(turned[0], turned[1], atol=1e-3)


def test_random_vectors_are_as_long_as_the_mapped_state_of_the_same_place(run: SimpleNamespace) -> None:
    found = states(run, 2)
    lengths = [np.linalg.norm(found[name], axis=1) for name in ("random_norm", "mapped")]
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-4)


def test_one_document_alone_has_nothing_to_shuffle_with(run: SimpleNamespace) -> None:
    window = run.windows[0]
    same = [w for w in run.windows if w.document == window.document]
    assert states(run, 0, windows=same)["shuffled"] == "there is no other text to take states from"


class Answers:
    """A map of windows: what it makes of a token says where in the store its row is."""

    def __init__(self, adapter: Adapter) -> None:
        aligner = adapter.aligners[KEY]
        self.aligner = SimpleNamespace(
            pair=aligner.pair, tensors=aligner.tensors, widths=aligner.widths, takes_rows=False, apply=None
        )
        self.read: list[tuple[Rows, Window]] = []

    def states(self, rows: Rows, window: Window) -> Rows:
        self.read.append((rows, window))
        answer = np.zeros((len(window.places), 32), np.float32)
        answer[:, 0], answer[:, 1] = 1 + window.number, np.arange(len(window.places))
        return answer


def test_a_map_of_windows_is_shuffled_among_its_answers_to_another_document(run: SimpleNamespace) -> None:
    numbers = set()
    for at, window in enumerate(run.windows[:6]):
        to = Answers(run.adapter)
        found = states(run, at, to=to)
        shuffled = found["shuffled"]
        assert shuffled.shape == found["mapped"].shape
        [number] = set(shuffled[:, 0])
        [other] = [w for w in run.windows if 1 + w.number == number]
        assert other.document != window.document
        # Places at random, not in their order.
        assert (np.diff(shuffled[:, 1]) < 0).any()
        numbers.add(other.number)
        # It has read all of the other window's own states.
        rows, read = to.read[-1]
        assert read is other
        stored = run.store.rows("llama", 2)[other.source_row : other.source_row + len(other.source.ids)]
        np.testing.assert_array_equal(rows, stored)
        # Lengths come from its own answers: rows one by one it cannot map.
        np.testing.assert_allclose(
            np.linalg.norm(found["random_norm"], axis=1), np.linalg.norm(found["mapped"], axis=1), rtol=1e-4
        )
    assert len(numbers) > 2


def test_layers_of_a_joint_map_come_end_to_end_in_their_order(run: SimpleNamespace) -> None:
    from align.layers import LayerPair

    pair = LayerPair("llama", (3, 0), "mistral", 2)
    to = Answers(run.adapter)
    to.aligner.pair = pair
    window = run.windows[0]
    rows = stitcher(run, to).inner._rows(window, to.aligner)
    here = slice(window.source_row, window.source_row + len(window.source.ids))
    for number, layer in enumerate((3, 0)):
        np.testing.assert_array_equal(
            rows[:, 48 * number : 48 * (number + 1)], run.store.rows("llama", layer)[here].astype(np.float32)
        )


def test_a_windows_size_is_that_of_its_text(run: SimpleNamespace) -> None:
    for window in run.windows:
        assert window.size == len(run.store.corpus.window_text(window.number).encode())


def test_the_share_replaced_is_of_ordinary_tokens(run: SimpleNamespace) -> None:
    made = stitcher(run)
    for name in ("clean", "self", "mapped", "mean"):
        made.inner._tallies[KEY, name] = tally = _tally()
        assert tally.sums
    made.inner._identical[KEY] = True
    entry = made.inner.entry(made.to)
    ordinary = sum(int((~w.target.special).sum()) for w in run.windows)
    assert sum(int(w.target.special.sum()) for w in run.windows) > 0
    assert entry["replaced_share"] == sum(int((w.taken >= 0).sum()) for w in run.windows) / ordinary


def _tally() -> Any:
    from evaluate.stitch_scores import Tally

    tally = Tally()
    tally.add(0, 1.0, 1, 1)
    return tally
