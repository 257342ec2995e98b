"""What every condition puts at a text's places: from which source states, and by which seed.

Of a stitched run, where they are rows of the store, and of generated text, where they are the other prompts'.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import evaluate.injection.reading
from align.layers import LayerPair
from align.maps.fitted import Adapter, Aligner, load_adapter
from align.runs.train import train
from align.settings import Settings
from align.tokens.table import TokenTable
from evaluate.generation import generate, voices
from evaluate.injection.controls import CONTROLS, token_table
from evaluate.injection.loading import load
from evaluate.injection.wire import Rows, Wire, wire
from evaluate.stitching.stitch import _Stitcher
from evaluate.stitching.windows import Window, scored_windows
from featstore.store import Store, open_store
from featstore.text.tokens import TokenizedWindow

KEY, LAYERS = "llama:2->mistral:2", (2, 2)


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("conditions") / "run"
    train(Settings(str(tiny_store), "affine", layers="2"), directory, quiet=True)
    adapter, store = load_adapter(directory), open_store(tiny_store)
    # The training documents: there are more of them.
    windows = scored_windows(store, "llama", "mistral", split=0, max_tokens=2500)
    assert len({w.document for w in windows}) > 2
    table = token_table(adapter, adapter.aligners[KEY])
    assert isinstance(table, TokenTable)
    return SimpleNamespace(adapter=adapter, store=store, windows=windows, table=table)


def tokens_of(ids: Any, special: Any = None) -> TokenizedWindow:
    """A window in which every token is a byte long."""
    numbers = np.asarray(ids, dtype=np.int32)
    ends = np.arange(1, len(numbers) + 1, dtype=np.int32)
    special = np.zeros(len(numbers), bool) if special is None else special
    return TokenizedWindow(numbers, ends, special, np.ones(len(numbers), bool))


def stitcher(run: SimpleNamespace, to: Any = None, *, seed: int = 0, windows: list[Window] | None = None) -> Any:
    to = to or wire(run.adapter, run.adapter.aligners[KEY])
    given = run.windows if windows is None else windows
    tokens = {to.aligner.pair.key: run.table}
    inner = _Stitcher(run.store, given, [to], tokens, keep="own", controls=CONTROLS, seed=seed)
    return SimpleNamespace(to=to, inner=inner)


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


def test_token_states_are_predictions_for_the_tokens_whose_rows_the_places_take(run: SimpleNamespace) -> None:
    ids = run.table.ids.tolist()
    for at, window in enumerate(run.windows[:4]):
        tokens = run.store.tokens("llama").id[window.source_row + window.taken[window.places]]
        # The table keeps the tokens of validation and test text; others are predicted to have the mean state.
        expected = [run.table.states[ids.index(token)] if token in ids else run.table.mean for token in tokens]
        assert any(token in ids for token in tokens)
        np.testing.assert_array_equal(states(run, at)["token"], expected)


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
        assert np.array_equal(first[name], other[name]) == (name in ("token", "mean", "zero")), name
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
    for name in ("clean", "self", "mapped", "mean", "token"):
        made.inner._tallies[KEY, name] = tally = _tally()
        assert tally.sums
    made.inner._identical[KEY] = True
    entry = made.inner.entry(made.to)
    ordinary = sum(int((~w.target.special).sum()) for w in run.windows)
    assert sum(int(w.target.special.sum()) for w in run.windows) > 0
    assert entry["n_documents"] == 1 < len(run.windows)
    assert entry["replaced_share"] == sum(int((w.taken >= 0).sum()) for w in run.windows) / ordinary


def _tally() -> Any:
    from evaluate.stitching.scores import Tally

    tally = Tally()
    tally.add(0, 1.0, 1, 1)
    return tally


def test_the_budget_is_of_the_targets_tokens_and_its_first_excess_ends_it(run: SimpleNamespace) -> None:
    for source, target in (("llama", "mistral"), ("mistral", "llama")):
        everything = scored_windows(run.store, source, target, split=0)
        upto = np.cumsum([len(w.target.ids) for w in everything])
        for count in (1, 3, 6):
            for more, expected in ((-1, max(count - 1, 1)), (0, count)):
                few = scored_windows(run.store, source, target, split=0, max_tokens=int(upto[count - 1]) + more)
                assert [w.number for w in few] == [w.number for w in everything[:expected]]


def test_a_window_without_a_scored_token_is_left_out(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = scored_windows(run.store, "llama", "mistral", split=0)
    shortest = min(len(w.target.ids) for w in everything)
    # As many tokens as are not scored.
    monkeypatch.setattr("evaluate.stitching.windows.FIRST_SCORED", shortest)
    left = scored_windows(run.store, "llama", "mistral", split=0)
    assert [w.number for w in left] == [w.number for w in everything if len(w.target.ids) > shortest]
    made = stitcher(run)
    made.inner.windows = [SimpleNamespace(source=tokens_of([5, 6]), document=0)]
    monkeypatch.undo()
    model = SimpleNamespace(
        device="cpu", model=lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 9))
    )
    assert list(made.inner.alone(model)) == [2]
    assert not made.inner._source_tally.sums


def test_a_model_alone_is_tallied_by_document(run: SimpleNamespace) -> None:
    made = stitcher(run)
    model = SimpleNamespace(
        device="cpu", model=lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 9))
    )
    made.inner.windows = [
        SimpleNamespace(source=tokens_of(range(5)), source_counts=None, document=document) for document in (3, 8, 3)
    ]
    assert list(made.inner.alone(model)) == [5, 5, 5]
    table = made.inner._source_tally.table()
    assert table[:, 1].tolist() == [6, 3]
    np.testing.assert_allclose(table[:, 0], np.log(9) * table[:, 1], rtol=1e-6)


def test_one_window_whose_own_states_change_a_bit_is_enough(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stitcher(run, windows=run.windows[:2])
    model = load(run.adapter, "mistral", (), device="cpu", quiet=True)
    # The first window's comparison fails, the second one's does not.
    answers = iter([False])
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: equal(a, b) and next(answers, True))
    assert list(made.inner.stitched(model)) == [len(w.target.ids) * made.inner._passes for w in run.windows[:2]]
    assert made.inner.entry(made.to)["self_bit_identical"] is False


# Of generated text.

#: Tokens of the prompts; of each the first one is special and the third a sink.
LENGTHS, SPECIAL, SINK = (9, 6, 9), 0, 2
ORDINARY = {(row, token) for row, count in enumerate(LENGTHS) for token in range(count) if token not in (SPECIAL, SINK)}


def read() -> list[generate.Read]:
    """Prompts in batches of two, padded at the left: a state says of which prompt and token it is."""
    reads = []
    for rows in ((0, 1), (2,)):
        longest = max(LENGTHS[row] for row in rows)
        states = torch.full((len(rows), longest, 4), torch.nan)
        windows, sinks = [], []
        for i, row in enumerate(rows):
            tokens = np.arange(LENGTHS[row])
            states[i, longest - LENGTHS[row] :] = torch.from_numpy(np.stack([0 * tokens + row, tokens], 1)).repeat(1, 2)
            windows.append(tokens_of(tokens, tokens == SPECIAL))
            sinks.append(tokens == SINK)
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        reads.append(generate.Read(windows, ids, None, {1: states}, sinks))
    return reads


def put(seed: int = 0) -> list[Any]:
    """What is put into the prompts by the map that doubles a state."""
    zero = np.zeros(4, np.float32)
    tensors: dict[str, Any] = dict.fromkeys(("mean_source", "mean_target", "control_mean_source"), zero)
    tensors |= {"weight": 2 * np.eye(4, dtype=np.float32), "control_mean": zero + 7}
    to = Wire(Aligner(LayerPair("a", (1,), "b", 3), tensors), None, False, None)
    return generate._states(to, read(), read(), ("one", "two", "three"), seed)


def test_a_prompt_takes_its_own_ordinary_states() -> None:
    for row, (text, states) in enumerate(put()):
        assert text.places.tolist() == [token for r, token in sorted(ORDINARY) if r == row]
        np.testing.assert_array_equal(states["mapped"][:, 0], 2 * row)
        np.testing.assert_array_equal(states["mapped"][:, 1], 2 * text.places)
        assert states["self"] is None
        assert (states["mean"] == 7).all()


def test_a_prompt_is_shuffled_with_ordinary_states_of_the_other_prompts() -> None:
    drawn: dict[int, set[tuple[int, int]]] = {0: set(), 1: set(), 2: set()}
    for seed in range(40):
        for row, (_, states) in enumerate(put(seed)):
            assert states["shuffled"].shape == states["mapped"].shape
            drawn[row] |= {(int(a), int(b)) for a, b in states["shuffled"][:, :2] / 2}
    for row, found in drawn.items():
        # All of them in the long run, from whatever batch, and no special token, no sink and none of its own.
        assert found == {(r, token) for r, token in ORDINARY if r != row}


def test_the_seed_and_the_prompt_fix_its_random_vectors() -> None:
    first, again, other = ([states["random_norm"] for _, states in put(seed)] for seed in (0, 0, 1))
    for row, noise in enumerate(first):
        np.testing.assert_array_equal(noise, again[row])
        assert (noise != other[row]).all()
        np.testing.assert_allclose(
            np.linalg.norm(noise, axis=1), np.linalg.norm(put()[row][1]["mapped"], axis=1), rtol=1e-5
        )
    units = [noise[0] / np.linalg.norm(noise[0]) for noise in first]
    assert max(abs(units[a] @ units[b]) for a, b in ((0, 1), (0, 2), (1, 2))) < 0.999


def test_a_model_reads_prompts_at_every_layer_that_a_map_or_the_sink_rule_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def states(model: Any, stream: Any, ids: torch.Tensor, layers: list[int], *, padding: Any) -> Any:
        # A state is its layer and its token; token 12 is a sink, which shows at layer 5 alone. There is no start token.
        return {k: torch.stack([torch.full_like(ids, k), ids + 100 * (k == 5)], dim=-1) for k in layers}

    monkeypatch.setattr(evaluate.injection.reading, "prompt_states", states)
    loaded: Any = SimpleNamespace(
        name="a",
        model=None,
        stream=None,
        median_norm={0: 1.0, 5: 1.0},
        is_sink=lambda found: torch.stack([value[..., 1] == 112 for value in found.values()]).any(dim=0),
    )
    windows = [tokens_of([10, 11, 12]), tokens_of([10, 11])]
    maps: Any = [SimpleNamespace(pair=LayerPair(*names)) for names in (("a", (1, 3), "b", 2), ("b", (6,), "a", 4))]
    found = voices._read(loaded, windows, maps)
    assert sorted(found.states) == [1, 3, 4]
    assert [sinks.tolist() for sinks in found.sinks] == [[True, False, True], [True, False]]
    assert [found.first(row) for row in (0, 1)] == [0, 1]
    assert found.rows(0, (3, 1)).tolist() == [[3, 10, 1, 10], [3, 11, 1, 11], [3, 12, 1, 12]]
    assert found.rows(1, (1,)).tolist() == [[1, 10], [1, 11]]
