"""What goes over to the target: each kind of map gets what it was trained on, and a card that does not fit is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from align.compress import fit as compress_fit
from align.compress.layout import Layout
from align.compress.resampler import Resampler
from align.compress.windows import Windows
from align.layers import LayerPair
from align.maps.fitted import Adapter, Aligner, load_adapter
from align.runs.train import train
from align.settings import LoopSettings, Settings
from evaluate.generation.generate import describe as described_texts
from evaluate.generation.generate import generate
from evaluate.injection.loading import choose
from evaluate.injection.positions import source_positions
from evaluate.injection.wire import Crossing, crossing, wire
from evaluate.stitching.stitch import CONDITIONS, describe, scored_windows, stitch
from featstore.errors import AdapterError, SpecError
from featstore.store import open_store
from featstore.text.splits import TEST
from featstore.text.tokens import TokenizedWindow
from featstore.text.windows import windows as cut

KEY = "llama:2->mistral:2"


def tokens(ends: list[int], special: int = 0) -> TokenizedWindow:
    return TokenizedWindow(
        np.arange(len(ends)), np.array(ends, np.int32), np.arange(len(ends)) < special, np.ones(len(ends), bool)
    )


def text_of(source: list[int], target: list[int], sinks: tuple[int, ...] = (), target_special: int = 0) -> Crossing:
    first, second = tokens(source), tokens(target, target_special)
    return crossing(first, second, np.isin(np.arange(len(source)), sinks), np.zeros(len(target), bool))


def states(n: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def module(seed: int = 0, *, stride: int = 2) -> Resampler:
    """A resampler whose answers depend on everything it reads."""
    import torch

    layout = Layout(3, 4, stride, positions=False)
    made = Resampler(
        layout,
        basis=states(6, 6, 1),
        mean_source=states(1, 6, 2)[0],
        mean_target=states(1, 5, 3)[0],
        readout=states(layout.most_coordinates, 5, 4),
        unit=1.5,
        width=8,
        depth=1,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made.eval()


def adapter_of(kind: str = "compress", *, window_bytes: int | None = None, **card: Any) -> Adapter:
    means = {"control_mean_source": np.zeros(6, np.float32), "control_mean": np.zeros(5, np.float32)}
    pair = LayerPair("a", (1,), "b", 2)
    if kind == "compress":
        made = module()
        aligner = Aligner(pair, {**made.export(), **means}, made.options, 1, "compress")
    else:
        own = {"weight": states(6)[:, :5], "mean_source": states(1, 6, 5)[0], "mean_target": states(1, 5, 6)[0]}
        aligner = Aligner(pair, {**own, **means})
    whole = {
        "models": {"a": {"width": 6, "depth": 3}, "b": {"width": 5, "depth": 3}},
        "mask": {"sink_threshold": 5.0, "keep_sinks": False},
        "corpus": {"bytes": 100, "windows": 3},
        **({"window_bytes": window_bytes} if window_bytes else {}),
        **card,
    }
    return Adapter(Path("runs/x"), whole, {pair.key: aligner})


def wired(kind: str = "compress", **options: Any) -> Any:
    adapter = adapter_of(kind, **options)
    return wire(adapter, next(iter(adapter.aligners.values())))


SOURCE, TARGET = [2, 4, 6, 8, 10, 12], [0, 1, 4, 5, 9, 12]


def test_sinks_of_either_side_and_special_tokens_take_nothing() -> None:
    text = text_of(SOURCE, TARGET, sinks=(1,), target_special=1)
    assert source_positions(text.source, text.target).tolist() == [-1, -1, 1, 1, 3, 5]
    assert text.taken.tolist() == [-1, -1, -1, -1, 3, 5]
    assert text.places.tolist() == [4, 5]
    other = crossing(text.source, text.target, text.source_sink, np.arange(6) == 4)
    assert other.places.tolist() == [5]


def test_a_map_of_rows_goes_row_by_row() -> None:
    text, x = text_of(SOURCE, TARGET, sinks=(1,), target_special=1), states(6)
    to = wired("linear")
    t = to.aligner.tensors
    assert np.allclose(to.states(x, text), (x[[3, 5]] - t["mean_source"]) @ t["weight"] + t["mean_target"], atol=1e-6)
    assert to.rate([10]) is None
    assert to.pieces("any text") == []


def test_a_map_of_windows_reads_ordinary_tokens_without_sinks() -> None:
    text, x = text_of(SOURCE, TARGET, sinks=(1,), target_special=1), states(6)
    kept = [0, 2, 3, 4, 5]
    ends = text.target.byte_end
    # It answers at all ordinary target tokens, as in training: what a position is told depends on the one before.
    wanted = module().reconstruct(x[kept], text.source.byte_end[kept], ends[1:])[[3, 4]]
    assert np.array_equal(wired().states(x, text), wanted)
    assert not np.allclose(module().reconstruct(x[kept], text.source.byte_end[kept], ends[[4, 5]]), wanted)
    # With sinks kept in training they are read; where nothing is taken there is nothing to answer.
    with_sinks = wired(mask={"keep_sinks": True}).states(x, text)
    assert np.array_equal(with_sinks, module().reconstruct(x, text.source.byte_end, ends[1:])[[3, 4]])
    assert not np.allclose(with_sinks, wanted)
    nothing = text_of(SOURCE, TARGET, sinks=(0, 1, 2, 3, 4, 5))
    assert wired().states(x, nothing).shape == (0, 5)


def test_a_long_text_is_read_in_the_windows_of_training() -> None:
    to, text = wired(window_bytes=6), "ab cd ef gh ij kl"
    assert to.pieces(text) == [end for _, end in cut(text.encode(), 6)] == [5, 11, 17]
    source, target = [2, 5, 8, 11, 14, 17], [5, 7, 11, 13, 17]
    x, both = states(6), text_of(source, target)
    found = to.states(x, both, to.pieces(text))
    # Byte ends count from the start of each piece.
    parts = [
        module().reconstruct(x[a:b], np.array(source[a:b]) - start, np.array(target[c:d]) - start)
        for start, a, b, c, d in ((0, 0, 2, 0, 1), (5, 2, 4, 1, 3), (11, 4, 6, 3, 5))
    ]
    assert both.places.tolist() == [0, 1, 2, 3, 4]
    # The second target token, at byte 7, follows the source token that ends at 5.
    assert np.array_equal(found, np.concatenate(parts))
    assert not np.allclose(found, to.states(x, both))


def test_a_piece_without_source_tokens_is_answered_by_the_one_before() -> None:
    x, both = states(4), text_of([2, 5, 14, 17], [5, 9, 17])
    found = wired(window_bytes=6).states(x, both, [5, 11, 17])
    before = module().reconstruct(x[:2], np.array([2, 5]), np.array([5, 9]))
    after = module().reconstruct(x[2:], np.array([3, 6]), np.array([6]))
    assert np.array_equal(found, np.concatenate([before, after]))


def test_ends_inside_characters_and_tokens_that_read_nothing_stay_in_their_pieces() -> None:
    # A space before the text, two tokens inside a character across no boundary, one that reads nothing at a boundary.
    source, target = [0, 3, 4, 5, 5, 8, 11], [0, 1, 5, 9, 10, 11]
    exact = np.array([True, True, False, True, True, True, True])
    first = dataclasses.replace(tokens(source), exact=exact)
    both = crossing(first, tokens(target), np.zeros(7, bool), np.zeros(6, bool))
    # Before the source has read anything, and at what is not exact, no state is taken.
    assert both.taken.tolist() == [-1, -1, 4, 5, 5, 6]
    x = states(7)
    found = wired(window_bytes=6).states(x, both, [5, 11])
    head = module().reconstruct(x[:5], np.array(source[:5]), np.array(target[:3]))
    tail = module().reconstruct(x[5:], np.array(source[5:]) - 5, np.array(target[3:]) - 5)
    assert np.array_equal(found, np.concatenate([head, tail])[both.places])
    # A piece whose tokens have all read nothing yet is still one.
    nothing = crossing(tokens([0, 0]), tokens([0, 2]), np.zeros(2, bool), np.zeros(2, bool))
    assert wired().states(states(2), nothing).shape == (0, 5)
    assert np.isfinite(module().reconstruct(states(2), np.array([0, 0]), np.array([0, 2]))).all()


def test_without_a_recorded_window_the_mean_of_the_corpus_counts() -> None:
    assert wired().window_bytes == 34
    assert wired(window_bytes=2048).window_bytes == 2048
    assert wired().pieces("short") == [5]


def test_the_rate_is_bytes_of_latents_for_a_byte_of_text() -> None:
    rate = wired().rate([10, 86])
    # Three latents of four numbers of two bytes, over 48 bytes of text in the mean.
    assert rate["latent_bytes"] == 24
    assert (rate["windows"], rate["text_bytes"], rate["latent_bytes_per_text_byte"]) == (2, 48.0, 0.5)


def test_a_card_that_does_not_fit_is_refused_in_one_line() -> None:
    wrong_width = {"a": {"width": 6, "depth": 3}, "b": {"width": 7, "depth": 3}}
    for kind in ("linear", "compress"):
        with pytest.raises(AdapterError, match=r"the map has width 5 for 'b', the card of runs/x says 7; train"):
            wired(kind, models=wrong_width)
    with pytest.raises(AdapterError, match=r"card of runs/x does not fit its compress map \(mask.keep_sinks: "):
        wired(mask={})
    with pytest.raises(AdapterError, match=r"does not fit its compress map \(corpus: "):
        wired(corpus={"bytes": 10, "windows": 0})
    adapter = adapter_of()
    [aligner] = adapter.aligners.values()
    bare = dataclasses.replace(aligner, options={})
    with pytest.raises(AdapterError, match=r"\(options: these are not the tensors and options of a compress map"):
        wire(adapter, bare)
    wide = {**aligner.tensors, "control_mean": np.zeros(7, np.float32)}
    other = adapter_of(models=wrong_width)
    with pytest.raises(AdapterError, match=r"the resampler takes and gives widths \(6, 5\), the card .* \(6, 7\)"):
        wire(other, dataclasses.replace(aligner, tensors=wide))


def test_states_of_another_shape_are_refused() -> None:
    for kind in ("linear", "compress"):
        for x in (states(5), states(6, 7)):
            with pytest.raises(AdapterError, match=r"source states have shape .* the map needs \(6, 6\)"):
                wired(kind).states(x, text_of(SOURCE, TARGET))


def test_maps_of_every_kind_are_chosen_by_layer() -> None:
    adapter = adapter_of()
    assert choose(adapter, None) == list(adapter.aligners.values())
    assert choose(adapter, "1") == list(adapter.aligners.values())
    with pytest.raises(SpecError, match="--layers 2: this run maps layers 1"):
        choose(adapter, "2")


# A trained run.


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("compress") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_fit, "EPOCH_STEPS", 4)
        loop = LoopSettings(latents=16, latent_dim=16, epochs=1, tracker="none")
        train(Settings(str(tiny_store), "compress", layers="2", loop=loop), directory, quiet=True)
    return SimpleNamespace(store=open_store(tiny_store), adapter=load_adapter(directory))


def test_a_stored_window_goes_through_as_in_training(run: SimpleNamespace) -> None:
    aligner, store = run.adapter.aligners[KEY], run.store
    to = wire(run.adapter, aligner)
    seen = Windows(store, aligner.pair, store.pairs("llama", "mistral"), TEST)
    resampler = Resampler.from_tensors(aligner.tensors, aligner.options)
    for window in scored_windows(store, "llama", "mistral", max_tokens=600):
        trained = seen.read(window.number)
        wanted = resampler.reconstruct(trained.x, trained.ends_x, trained.ends_y)
        rows = store.rows("llama", 2)[window.source_row : window.source_row + len(window.source.ids)]
        found = to.states(rows, window)
        ordinary = np.flatnonzero(~window.target.special & ~window.target_sink)
        assert len(wanted) == len(ordinary)
        assert np.array_equal(found, wanted[np.isin(ordinary, window.places)])


def test_a_compress_run_is_stitched_with_all_its_controls(run: SimpleNamespace) -> None:
    result = stitch(run.store, run.adapter, max_tokens=500, quiet=True)
    entry = result["pairs"][KEY]
    nats = {name: block and block["nats_per_token"] for name, block in entry["conditions"].items()}
    assert result["adapter_type"] == "compress"
    assert [name for name in CONDITIONS if nats[name] is None] == ["raw"]
    assert entry["self_bit_identical"]
    assert len({nats[name] for name in ("mapped", "shuffled", "random_norm", "mean")}) == 4
    windows = scored_windows(run.store, "llama", "mistral", max_tokens=500)
    size = np.mean([len(run.store.corpus.window_text(w.number).encode()) for w in windows])
    assert entry["rate"]["latent_bytes_per_text_byte"] == pytest.approx(16 * 16 * 2 / size)
    assert "512.0 bytes a window" in describe(result)
    other = stitch(run.store, run.adapter, max_tokens=500, seed=1, quiet=True)["pairs"][KEY]["conditions"]
    assert other["mapped"] == entry["conditions"]["mapped"]
    assert other["shuffled"] != entry["conditions"]["shuffled"]


def test_prompts_go_through_a_compress_map(run: SimpleNamespace) -> None:
    prompts = ("The capital of France is", "One line with a dash and another")
    result = generate(run.adapter, prompts, max_new_tokens=3, quiet=True)
    for entry in result["entries"]:
        assert entry["source_to_target"][KEY]["self"] == entry["target_alone"]
        nats = entry["likelihood"]["source_to_target"][KEY]
        assert nats["self"] == pytest.approx(entry["likelihood"]["target_alone"], abs=1e-6)
        assert set(nats) == {"mapped", "self", "mean", "random_norm", "shuffled"}
    told = [entry["likelihood"]["source_to_target"][KEY] for entry in result["entries"]]
    assert any(nats["mapped"] != nats["shuffled"] for nats in told)
    assert any(nats["mapped"] > nats["self"] + 0.1 for nats in told)
    assert prompts[1] in described_texts(result)
    [alone] = generate(run.adapter, prompts[:1], max_new_tokens=3, quiet=True)["entries"]
    assert alone["source_to_target"][KEY]["shuffled"] is None
    assert alone["likelihood"]["source_to_target"][KEY]["shuffled"] is None
