"""Stitched loss: what is replaced, what is scored, and how a perfect map, no map and the controls come out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, strict_json

from align.aligners import Adapter, Aligner, load_adapter, save_adapter
from align.layers import LayerPair
from align.settings import Settings
from align.train import train
from evaluate.controls import CONTROLS
from evaluate.inject import source_positions
from evaluate.loading import load
from evaluate.stitch import CONDITIONS, Window, _Stitcher, describe, scored_windows, stitch
from evaluate.stitch_scores import Tally, add_window
from evaluate.wire import Wire
from featstore.console import jsonable
from featstore.corpus import TEST
from featstore.errors import AdapterError, ModelLoadError, PairingError, SpecError, StoreStateError
from featstore.models import load_model, weights_fingerprint
from featstore.spec import ModelSpec
from featstore.store import Store, open_store
from featstore.tokens import TokenizedWindow


def extracted(path: Path, corpus: Path, *models: str, layers: tuple[str, ...], form: str = "float32") -> Path:
    from featstore.extract import extract
    from featstore.job import Settings as Extraction
    from featstore.job import prepare

    settings = Extraction(
        model=models,
        layers=layers,
        dataset=f"jsonl:{corpus}",
        store=path,
        max_tokens=None,
        window_bytes=512,
        batch_tokens=1024,
        shard_rows=2048,
        form=form,
        device="cpu",
    )
    extract(prepare(settings, quiet=True), quiet=True)
    return path


@pytest.fixture(scope="module")
def itself(tiny_llama: Path, short_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model, exactly stored, and the map from each of its layers to itself: the ceiling."""
    base = tmp_path_factory.mktemp("itself")
    store = extracted(base / "s.zarr", short_corpus, f"llama={tiny_llama}", layers=("0,1,3",))
    train(Settings(str(store), "procrustes"), base / "run", quiet=True)
    return SimpleNamespace(store=open_store(store), run=base / "run", adapter=load_adapter(base / "run"))


@pytest.fixture(scope="module")
def pair(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Maps between two models of different width, depth and tokenizer, in both directions."""
    run = tmp_path_factory.mktemp("pair") / "run"
    train(Settings(str(tiny_store), "affine", both=True), run, quiet=True)
    adapter = load_adapter(run)
    store = open_store(tiny_store)
    return SimpleNamespace(
        store=store, run=run, adapter=adapter, result=stitch(store, adapter, max_tokens=350, quiet=True)
    )


@pytest.fixture(scope="module")
def ceiling(itself: SimpleNamespace) -> dict[str, Any]:
    return stitch(itself.store, itself.adapter, max_tokens=350, quiet=True)


def test_a_model_mapped_to_itself_recovers_everything(ceiling: dict[str, Any]) -> None:
    assert list(ceiling["pairs"]) == [f"llama:{k}->llama:{k}" for k in (0, 1, 3)]
    for key, entry in ceiling["pairs"].items():
        nats = {name: figures["nats_per_token"] for name, figures in entry["conditions"].items()}
        assert entry["self_bit_identical"], key
        assert nats["self"] == nats["clean"]
        # The raw states are the model's own, as the store has them from other batches.
        assert nats["raw"] == pytest.approx(nats["clean"], abs=1e-5)
        assert nats["mapped"] == pytest.approx(nats["clean"], abs=1e-4)
        assert nats["mean"] > nats["clean"] + 0.1
        assert entry["recovered"]["value"] == pytest.approx(1, abs=1e-3)
        # Its own raw states are no control of a model against itself.
        assert entry["recovered_best_control"]["control"] != "raw"


def test_the_clean_loss_is_the_cross_entropy_of_the_third_token_on(itself: SimpleNamespace, tiny_llama: Path) -> None:
    # One window: a budget of one token still gives one.
    [window] = scored_windows(itself.store, "llama", "llama", max_tokens=1)
    figures = stitch(itself.store, itself.adapter, layers="1", max_tokens=1, quiet=True)["pairs"]["llama:1->llama:1"]
    model = load_model(ModelSpec("llama", str(tiny_llama)), device="cpu", dtype="float32")
    ids = torch.from_numpy(window.target.ids.astype(np.int64))
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0].double()
    total = 0.0
    for position in range(2, len(ids)):
        row = logits[position - 1]
        total += float(torch.logsumexp(row, 0) - row[ids[position]])
    count = len(ids) - 2
    clean = figures["conditions"]["clean"]
    assert (figures["n_tokens"], figures["n_documents"]) == (count, 1)
    assert clean["nats_per_token"] == pytest.approx(total / count, abs=1e-5)
    # Bits over the bytes those tokens span: from the end of the second token to the end of the window.
    text = itself.store.corpus.window_text(np.flatnonzero(itself.store.corpus.window_split == TEST)[0])
    spanned = len(text.encode()) - int(window.target.byte_end[1])
    assert clean["bits_per_byte"] == pytest.approx(total / math.log(2) / spanned, rel=1e-6)
    # One document gives no interval.
    assert all(math.isnan(bound) for bound in clean["ci95"])


def test_nats_and_bits_are_one_measure_in_two_units(pair: SimpleNamespace) -> None:
    for entry in pair.result["pairs"].values():
        ratios = {
            name: figures["bits_per_byte"] / figures["nats_per_token"]
            for name, figures in entry["conditions"].items()
            if figures is not None
        }
        assert max(ratios.values()) == pytest.approx(min(ratios.values()))


def test_every_condition_is_there_or_says_why_not(pair: SimpleNamespace) -> None:
    assert ("clean", "self", "mapped", *CONTROLS) == CONDITIONS
    assert list(pair.result["pairs"]) == [
        *(f"llama:{a}->mistral:{b}" for a, b in ((0, 0), (2, 2), (3, 4))),
        *(f"mistral:{b}->llama:{a}" for a, b in ((0, 0), (2, 2), (3, 4))),
    ]
    for key, entry in pair.result["pairs"].items():
        assert list(entry["conditions"]) == list(CONDITIONS)
        assert entry["conditions"]["raw"] is None
        widths = "48 and 32" if key.startswith("llama") else "32 and 48"
        assert entry["reasons"] == {"raw": f"widths differ ({widths})"}
        for name in set(CONDITIONS) - {"raw"}:
            figures = entry["conditions"][name]
            low, high = figures["ci95"]
            assert low <= figures["nats_per_token"] <= high
        assert entry["self_bit_identical"]
        assert entry["conditions"]["self"] == entry["conditions"]["clean"]
        assert 0.5 < entry["replaced_share"] <= 1
        # Random models predict nothing; states from nowhere cannot make that better by much.
        assert entry["n_documents"] >= 2
    strict_json(json.dumps(jsonable(pair.result)))


def test_a_run_of_both_directions_scores_both_models(pair: SimpleNamespace) -> None:
    clean = {
        key: (entry["conditions"]["clean"]["nats_per_token"], entry["n_tokens"])
        for key, entry in pair.result["pairs"].items()
    }
    assert len({v for k, v in clean.items() if k.startswith("llama")}) == 1
    assert len({v for k, v in clean.items() if k.startswith("mistral")}) == 1
    assert len(set(clean.values())) == 2


def test_the_seed_decides_the_random_controls_and_nothing_else(pair: SimpleNamespace) -> None:
    again, other = (
        stitch(pair.store, pair.adapter, layers="2", max_tokens=350, seed=seed, quiet=True)["pairs"] for seed in (0, 1)
    )
    for key in again:
        one, two = again[key]["conditions"], other[key]["conditions"]
        assert one == pair.result["pairs"][key]["conditions"]
        for name in ("clean", "self", "mapped", "mean", "zero"):
            assert one[name] == two[name], name
        for name in ("random_norm", "random_rotation", "shuffled"):
            assert one[name] != two[name], name


# The figures, by hand.

#: Two documents of 30 and 10 tokens over 60 and 40 bytes, and for each condition the nats per token in either.
TOKENS, BYTES = (30, 10), (60, 40)
LOSSES = {
    "clean": (1.0, 2.0),
    "self": (1.0, 2.0),
    "mapped": (2.0, 3.0),
    "mean": (5.0, 8.0),
    "zero": (9.0, 9.0),
    "random_norm": (4.0, 10.0),
    "random_rotation": (4.5, 4.0),
    "shuffled": (4.0, 6.0),
    "raw": (7.0, 7.0),
}


#: Nats of divergence per token and the share of tokens with the clean first choice, by document.
DIVERGENCES = {"mapped": ((1.0, 3.0), (0.9, 0.5)), "mean": ((4.0, 6.0), (0.1, 0.3))}


def entry_of(losses: dict[str, tuple[float, float]], source: str = "a") -> dict[str, Any]:
    """The entry of made-up losses: what is measured before and written after it is left out."""
    windows = [
        SimpleNamespace(target=SimpleNamespace(special=np.zeros(n + 2, bool)), places=np.arange(n + 2), size=1)
        for n in TOKENS
    ]
    pair = LayerPair(source, (1,), "b", 2)
    to = Wire(Aligner(pair, {}), None, False, None)
    run = _Stitcher(None, windows, [to], keep="own", seed=0)  # type: ignore[arg-type]
    run._identical[pair.key] = True
    for name, values in losses.items():
        tally = run._tallies[pair.key, name] = Tally()
        for document in (1, 0):
            # In two windows each: sums are by document.
            for part in (0.2, 0.8):
                tokens, size = TOKENS[document] * part, BYTES[document] * part
                divergences, shares = DIVERGENCES.get(name, ((0.0, 0.0), (1.0, 1.0)))
                same = round(shares[document] * tokens * 10) / 10
                divergence = divergences[document] * tokens
                tally.add(document, values[document] * tokens, int(tokens), int(size), divergence, same)
    return run.entry(to)


def test_losses_are_pooled_over_tokens() -> None:
    entry = entry_of(LOSSES)
    assert (entry["n_documents"], entry["n_tokens"]) == (2, 40)
    figures = {name: block["nats_per_token"] for name, block in entry["conditions"].items()}
    # (30 * 1 + 10 * 2) / 40 and so on; the mean of the documents' means would be 1.5.
    assert figures == {
        "clean": pytest.approx(1.25),
        "self": pytest.approx(1.25),
        "mapped": pytest.approx(2.25),
        "mean": pytest.approx(5.75),
        "zero": pytest.approx(9.0),
        "random_norm": pytest.approx(5.5),
        "random_rotation": pytest.approx(4.375),
        "shuffled": pytest.approx(4.5),
        "raw": pytest.approx(7.0),
    }
    # 50 nats are 72.13 bits, over 100 bytes.
    assert entry["conditions"]["clean"]["bits_per_byte"] == pytest.approx(0.72135, abs=1e-5)
    assert entry["conditions"]["mapped"]["bits_per_byte"] == pytest.approx(1.29843, abs=1e-5)


def test_recovered_is_the_share_of_the_way_from_the_mean_state_to_the_clean_loss() -> None:
    # (5.75 - 2.25) / (5.75 - 1.25), of pooled losses; the mean of the documents' own shares would be 0.792.
    entry = entry_of(LOSSES)
    assert entry["recovered"]["value"] == pytest.approx(3.5 / 4.5)
    # Resampling two documents gives one of them twice or both: 3 / 4 and 5 / 6 are the ends.
    assert entry["recovered"]["ci95"] == [pytest.approx(3 / 4), pytest.approx(5 / 6)]
    # A map that does better than the model's own states recovers more than everything, a harmful one less than nothing.
    better = entry_of({**LOSSES, "mapped": (0.5, 1.5)})["recovered"]["value"]
    worse = entry_of({**LOSSES, "mapped": (6.0, 8.0)})["recovered"]["value"]
    assert (better, worse) == (pytest.approx(5 / 4.5), pytest.approx(-0.75 / 4.5))


def test_the_best_control_is_the_one_with_the_lowest_pooled_loss() -> None:
    # In the larger document alone `shuffled` and `random_norm` are lower; `clean`, `self` and `mapped` are no controls.
    best = entry_of(LOSSES)["recovered_best_control"]
    assert best["control"] == "random_rotation"
    assert best["value"] == pytest.approx((4.375 - 2.25) / (4.375 - 1.25))
    # By document means `shuffled` (4.5) would lose to `random_rotation` (4.25); pooled it wins, 3.75 to 4.375.
    other = entry_of({**LOSSES, "shuffled": (3.0, 6.0)})["recovered_best_control"]
    assert other["control"] == "shuffled"
    assert other["value"] == pytest.approx((3.75 - 2.25) / (3.75 - 1.25))


def test_divergence_agreement_and_perplexity_by_hand() -> None:
    conditions = entry_of(LOSSES)["conditions"]
    mapped = conditions["mapped"]
    # (30 * 1 + 10 * 3) / 40, (30 * 0.9 + 10 * 0.5) / 40, e^2.25.
    assert (mapped["kl"], mapped["top1"]) == (pytest.approx(1.5), pytest.approx(0.8))
    assert mapped["perplexity"] == pytest.approx(9.487736)
    # Two documents resampled: either one twice, or both; the ends of each interval are the documents themselves.
    assert mapped["kl_ci95"] == [pytest.approx(1.0), pytest.approx(3.0)]
    assert mapped["top1_ci95"] == [pytest.approx(0.5), pytest.approx(0.9)]
    assert mapped["perplexity_ci95"] == [pytest.approx(math.exp(2)), pytest.approx(math.exp(3))]
    # 2 nats on 30 tokens over 60 bytes, and 3 nats on 10 over 40.
    assert mapped["bits_per_byte_ci95"] == [pytest.approx(0.75 / math.log(2)), pytest.approx(1 / math.log(2))]
    # Against the mean state: (30 * (5 - 2) + 10 * (8 - 3)) / 40.
    assert mapped["below_mean"] == pytest.approx(3.5)
    assert mapped["below_mean_ci95"] == [pytest.approx(3.0), pytest.approx(5.0)]
    assert conditions["zero"]["below_mean"] == pytest.approx((30 * -4 + 10 * -1) / 40)
    assert conditions["mean"]["below_mean_ci95"] == [0, 0]
    assert conditions["clean"]["kl_ci95"] == [0, 0]
    assert conditions["clean"]["top1_ci95"] == [1, 1]


def test_a_window_is_scored_as_the_formulas_say() -> None:
    # Longer than a slice of positions, with a special token in the middle.
    rng = np.random.default_rng(0)
    count, vocabulary = 300, 11
    q, p = rng.standard_normal((2, count, vocabulary)) * 2
    ids, special = rng.integers(vocabulary, size=count), np.zeros(count, bool)
    special[[0, 150]] = True
    ends = np.sort(rng.integers(1, 900, size=count)).astype(np.int32)
    tally = Tally()
    add_window(tally, 3, TokenizedWindow(ids, ends, special), torch.from_numpy(q), torch.from_numpy(p))
    log_q, log_p = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (q, p))
    at = np.array([t for t in range(2, count) if not special[t]])
    nats = -log_q[at - 1, ids[at]].sum()
    divergence = sum(float(np.exp(log_p[t - 1]) @ (log_p[t - 1] - log_q[t - 1])) for t in at)
    same = sum(int(q[t - 1].argmax() == p[t - 1].argmax()) for t in at)
    assert list(tally.sums) == [3]
    assert tally.sums[3] == pytest.approx([nats, len(at), ends[-1] - ends[1], divergence, same], rel=1e-5)
    # The untouched predictions do not diverge from themselves, whether they are given twice or once.
    for clean in (None, torch.from_numpy(q).clone()):
        other = Tally()
        add_window(other, 3, TokenizedWindow(ids, ends, special), torch.from_numpy(q), clean)
        assert other.sums[3][3:].tolist() == [0, len(at)]


def test_raw_states_are_a_control_unless_source_and_target_are_one_model() -> None:
    losses = {**LOSSES, "raw": (1.5, 2.5)}
    foreign = entry_of(losses)["recovered_best_control"]
    assert foreign["control"] == "raw"
    assert foreign["value"] == pytest.approx((1.75 - 2.25) / (1.75 - 1.25))
    assert entry_of(losses, source="b")["recovered_best_control"]["control"] == "random_rotation"
    # Where widths differ there are none.
    without = entry_of({name: values for name, values in losses.items() if name != "raw"})
    assert without["conditions"]["raw"] is None
    assert without["recovered_best_control"]["control"] == "random_rotation"


def test_nothing_is_recovered_where_the_control_does_no_harm() -> None:
    entry = entry_of({**LOSSES, "mean": (1.0, 1.0)})
    assert math.isnan(entry["recovered"]["value"])
    assert entry["recovered_best_control"]["control"] == "mean"


# Which positions are replaced.


def windows_of(store: Store, source: str, target: str) -> list[Window]:
    return scored_windows(store, source, target)


@pytest.mark.parametrize(("source", "target"), [("llama", "mistral"), ("mistral", "llama"), ("llama", "llama")])
def test_specials_and_sinks_of_either_side_keep_their_own_state(tiny_store: Path, source: str, target: str) -> None:
    store = open_store(tiny_store)
    read, table = store.tokens(source), store.tokens(target)
    kept = {"special": 0, "target sink": 0, "source sink": 0}
    for window in windows_of(store, source, target):
        start = int(np.searchsorted(table.window, read.window[window.source_row]))
        wanted = source_positions(window.source, window.target)
        for position, taken in enumerate(window.taken):
            assert table.id[start + position] == window.target.ids[position]
            if window.target.special[position]:
                reason = "special"
            elif table.sink[start + position]:
                reason = "target sink"
            elif wanted[position] >= 0 and read.sink[window.source_row + wanted[position]]:
                reason = "source sink"
            else:
                assert taken == wanted[position]
                continue
            kept[reason] += 1
            assert taken == -1
    assert (kept["special"] > 0) == (target == "mistral")
    if source != target:
        # The tiny models are made so that sinks occur.
        assert kept["target sink"] + kept["source sink"] > 0


def test_leading_positions_before_any_source_token_keep_their_own(tiny_store: Path) -> None:
    for window in windows_of(open_store(tiny_store), "llama", "mistral"):
        first = window.source.byte_end[~window.source.special][0]
        assert (window.taken[window.target.byte_end < first] == -1).all()


def test_only_the_replaced_positions_are_replaced(itself: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate.stitch as module

    seen: list[tuple[torch.Tensor, int]] = []
    original = module.inject

    def spy(stream: Any, injection: Any, *, whole: bool) -> Any:
        seen.append((injection.hidden.clone(), injection.layer))
        assert whole
        return original(stream, injection, whole=whole)

    monkeypatch.setattr(module, "inject", spy)
    [window] = scored_windows(itself.store, "llama", "llama", max_tokens=1)
    # A sink in the middle, so that there is something to keep.
    window.taken[7] = -1
    monkeypatch.setattr(module, "scored_windows", lambda *_, **__: [window])
    stitch(itself.store, itself.adapter, layers="1", quiet=True)
    own = seen[0][0]
    for hidden, layer in seen:
        assert layer == 1
        assert torch.equal(hidden[0, 7], own[0, 7])
        assert hidden.shape == own.shape
    zeros = [hidden for hidden, _ in seen if not hidden[0, window.taken >= 0].any()]
    assert len(zeros) == 1


def test_windows_go_round_the_documents_up_to_the_budget(tiny_store: Path) -> None:
    store = open_store(tiny_store)
    everything = scored_windows(store, "llama", "mistral")
    documents = {w.document for w in everything}
    split = store.corpus.document_split
    assert all(split[d] == TEST for d in documents)
    assert [w.document for w in everything[: len(documents)]] == sorted(documents)
    few = scored_windows(store, "llama", "mistral", max_tokens=400)
    assert sum(len(w.target.ids) for w in few) <= 400
    assert [w.document for w in few] == [w.document for w in everything[: len(few)]]
    assert len(scored_windows(store, "llama", "mistral", max_tokens=1)) == 1
    assert len(everything) == (store.corpus.window_split == TEST).sum()


def test_a_split_can_be_chosen(pair: SimpleNamespace) -> None:
    result = stitch(pair.store, pair.adapter, layers="2", split=1, max_tokens=100, quiet=True)
    assert result["split"] == "val"
    documents = {w.document for w in scored_windows(pair.store, "llama", "mistral", split=1)}
    assert all(pair.store.corpus.document_split[d] == 1 for d in documents)


def test_a_split_without_a_window_is_refused(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.store.StoredCorpus.window_split", property(lambda _: np.zeros(1, np.uint8)))
    with pytest.raises(PairingError, match=r"the test split of .* has no window to score"):
        scored_windows(pair.store, "llama", "mistral")


# What is hidden, and what the models do by themselves.


def test_under_hide_only_the_self_check_keeps_the_rest(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate.stitch as module

    seen: list[str] = []
    original = module.inject

    def spy(stream: Any, injection: Any, *, whole: bool) -> Any:
        seen.append(injection.keep)
        return original(stream, injection, whole=whole)

    monkeypatch.setattr(module, "inject", spy)
    result = stitch(pair.store, pair.adapter, layers="2", max_tokens=1, keep="hide", quiet=True)
    assert result["keep"] == "hide"
    assert seen == ["hide", "own", *["hide"] * 5] * 2
    own = stitch(pair.store, pair.adapter, layers="2", max_tokens=1, quiet=True)["pairs"]
    for key, entry in result["pairs"].items():
        # The check that injection is exact is made without hiding, which alone changes predictions.
        assert entry["self_bit_identical"]
        assert entry["conditions"]["clean"]["kl"] == 0
        assert entry["conditions"]["clean"]["nats_per_token"] == own[key]["conditions"]["clean"]["nats_per_token"]
    assert any(entry["conditions"]["self"]["kl"] > 1e-4 for entry in result["pairs"].values())
    assert "the others hidden" in describe(result)


def test_what_to_keep_is_own_or_hide(pair: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match="--keep all: choose one of own, hide"):
        stitch(pair.store, pair.adapter, keep="all", quiet=True)


def test_both_models_by_themselves_on_the_same_windows(
    pair: SimpleNamespace, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate.stitch as module

    loads: list[str] = []
    original = module.load

    def counted(adapter: Adapter, name: str, *args: Any, **options: Any) -> Any:
        loads.append(name)
        return original(adapter, name, *args, **options)

    monkeypatch.setattr(module, "load", counted)
    result = stitch(pair.store, pair.adapter, layers="2", max_tokens=150, source_alone=True, quiet=True)
    assert loads == ["mistral", "llama"]
    there, back = (result["pairs"][key] for key in ("llama:2->mistral:2", "mistral:2->llama:2"))
    for entry in (there, back):
        clean, alone = entry["conditions"]["clean"], entry["alone"]["target"]
        assert {name: alone[name] for name in ("nats_per_token", "ci95", "bits_per_byte", "perplexity")} == {
            name: clean[name] for name in ("nats_per_token", "ci95", "bits_per_byte", "perplexity")
        }
        assert alone["n_tokens"] == entry["n_tokens"]
    # The source's own loss, by hand.
    model = load_model(ModelSpec("llama", str(tiny_llama)), device="cpu", dtype="float32")
    nats, count, size = 0.0, 0, 0
    for window in scored_windows(pair.store, "llama", "mistral", max_tokens=150):
        ids = torch.from_numpy(window.source.ids.astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0].double()
        nats += float(torch.nn.functional.cross_entropy(logits[1:-1], ids[2:], reduction="sum"))
        count += len(ids) - 2
        size += int(window.source.byte_end[-1] - window.source.byte_end[1])
    alone = there["alone"]["source"]
    assert (alone["n_tokens"], alone["n_bytes"]) == (count, size)
    assert alone["nats_per_token"] == pytest.approx(nats / count, abs=1e-5)
    assert alone["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert alone["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert "source alone: perplexity" in describe(result)
    # It is measured only when asked for.
    assert pair.result["pairs"]["llama:2->mistral:2"]["alone"]["source"] is None
    assert "source alone" not in describe(pair.result)


# What does not fit together.


def test_another_store_is_refused(pair: SimpleNamespace, itself: SimpleNamespace) -> None:
    words = r"was fitted from a store with fingerprint .* use the store named in its card"
    with pytest.raises(AdapterError, match=words):
        stitch(itself.store, pair.adapter, quiet=True)


def test_another_model_is_refused(pair: SimpleNamespace, tiny_llama: Path, tiny_mistral: Path) -> None:
    for override, what in ((f"mistral={tiny_llama}", "depth"), (f"llama={tiny_mistral}", "depth")):
        with pytest.raises(AdapterError, match=rf"has {what} .* point to the right model with --model"):
            stitch(pair.store, pair.adapter, overrides=(override,), max_tokens=1, quiet=True)


def test_the_same_weights_with_another_tokenizer_are_refused(
    pair: SimpleNamespace, tiny_mistral: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_mistral, tmp_path / "moved")
    result = stitch(pair.store, pair.adapter, layers="2", overrides=(f"mistral={moved}",), max_tokens=1, quiet=True)
    assert result["pairs"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, moved / name)
    with pytest.raises(AdapterError, match=r"model 'mistral' .* has tokenizer"):
        stitch(pair.store, pair.adapter, layers="2", overrides=(f"mistral={moved}",), max_tokens=1, quiet=True)


def with_fingerprint(adapter: Adapter, model: str, fingerprint: str, dtype: str = "float32") -> Adapter:
    """The adapter as a store that recorded the weights would have it."""
    entry = {**adapter.card["models"][model], "weights_fingerprint": fingerprint, "compute_dtype": dtype}
    models = {**adapter.card["models"], model: entry}
    return Adapter(adapter.directory, {**adapter.card, "models": models}, adapter.aligners)


@pytest.fixture(scope="module")
def tuned(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mistral after a step of training: another function under the same configuration and tokenizer."""
    from safetensors.torch import load_file, save_file

    moved = shutil.copytree(tiny_mistral, tmp_path_factory.mktemp("tuned") / "mistral")
    tensors = load_file(moved / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    return moved


def test_a_fine_tune_of_the_model_is_refused(pair: SimpleNamespace, tiny_mistral: Path, tuned: Path) -> None:
    spec = ModelSpec("mistral", str(tiny_mistral))
    fingerprint = weights_fingerprint(load_model(spec, device="cpu", dtype="float32"))
    fitted = with_fingerprint(pair.adapter, "mistral", fingerprint)
    override = (f"mistral={tuned}",)
    words = r"model 'mistral' \(.*\) has weights .* fitted to .* point to the right model with --model mistral=REF"
    with pytest.raises(AdapterError, match=words):
        load(fitted, "mistral", override, device="cpu")
    assert load(fitted, "mistral", (), device="cpu").name == "mistral"
    # The dtype it is run in does not matter.
    assert load(fitted, "mistral", (), device="cpu", dtype="bfloat16").name == "mistral"
    with pytest.raises(AdapterError, match="has weights"):
        load(fitted, "mistral", override, device="cpu", dtype="bfloat16")
    # The other model of the run is not meant.
    assert load(fitted, "llama", (), device="cpu").name == "llama"


def test_weights_are_compared_only_where_both_sides_know_them(pair: SimpleNamespace, tuned: Path) -> None:
    override = (f"mistral={tuned}",)
    card = pair.adapter.card["models"]["mistral"]
    unrecorded = {**card, "weights_fingerprint": None}
    old = Adapter(pair.run, {**pair.adapter.card, "models": {"mistral": unrecorded}}, pair.adapter.aligners)
    assert load(old, "mistral", override, device="cpu").name == "mistral"
    # float16 loses what bfloat16 keeps of the smallest weights: between the two nothing can be said.
    other = with_fingerprint(pair.adapter, "mistral", "0" * 64, dtype="float16")
    assert load(other, "mistral", override, device="cpu").name == "mistral"
    with pytest.raises(AdapterError, match="has weights"):
        load(other, "mistral", override, device="cpu", dtype="float16")


def test_an_override_of_a_model_the_run_does_not_have_is_refused(pair: SimpleNamespace, tiny_llama: Path) -> None:
    with pytest.raises(SpecError, match=r"--model gemma=\.\.\.: this run has llama, mistral"):
        stitch(pair.store, pair.adapter, overrides=(f"gemma={tiny_llama}",), quiet=True)


def test_a_model_that_is_gone_is_named(pair: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="mistral"):
        stitch(pair.store, pair.adapter, overrides=(f"mistral={tmp_path / 'gone'}",), max_tokens=1, quiet=True)


def test_a_dtype_that_does_not_exist_is_not_blamed_on_the_model(tiny_llama: Path) -> None:
    with pytest.raises(SpecError, match=r"^dtype 'int4': choose one of auto, bfloat16"):
        load_model(ModelSpec("llama", str(tiny_llama)), device="cpu", dtype="int4")


def test_a_layer_the_run_does_not_map_is_named(pair: SimpleNamespace) -> None:
    with pytest.raises(SpecError, match="--layers 1: this run maps layers 0, 2, 3, 4"):
        stitch(pair.store, pair.adapter, layers="1", quiet=True)


def test_a_model_that_the_store_lacks_is_named(pair: SimpleNamespace) -> None:
    with pytest.raises(StoreStateError, match="no model 'gemma'"):
        scored_windows(pair.store, "gemma", "mistral")


# The command.


def test_the_command_writes_what_it_prints(
    pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("evaluate", "stitch", "--store", pair.store.path, "--adapter", pair.run, "--layers", "2")
    shown = call(capsys, *base, "--max-tokens", "350", "--out", tmp_path, "--json").json
    assert shown == strict_json((tmp_path / "stitch.json").read_text())
    expected = strict_json(json.dumps(jsonable(pair.result)))["pairs"]
    assert shown["pairs"] == {key: expected[key] for key in ("llama:2->mistral:2", "mistral:2->llama:2")}
    assert not (pair.run / "stitch.json").exists()
    text = call(capsys, *base, "--max-tokens", "200", "--out", tmp_path).out
    assert "llama:2->mistral:2" in text
    assert "nats/token" in text
    assert "recovered" in text


def test_people_are_warned_when_self_injection_is_not_exact(pair: SimpleNamespace) -> None:
    result = jsonable(pair.result)
    assert "do not trust these figures" not in describe(result)
    next(iter(result["pairs"].values()))["self_bit_identical"] = False
    assert "do not trust these figures" in describe(result)


# On the real pair.


@pytest.mark.demo_pair
def test_the_true_map_between_the_real_models_loses_nothing(
    demo_models: SimpleNamespace, sample_texts: list[str], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    from evaluate.generate import PROMPTS, generate

    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in sample_texts[:24]), encoding="utf-8")
    store = extracted(
        tmp_path / "s.zarr", corpus, f"smol={demo_models.smollm2}", f"twin={demo_models.twin_same}", layers=("15",)
    )
    run = tmp_path / "run"
    train(Settings(str(store), "procrustes"), run, quiet=True)
    fitted = load_adapter(run)
    [aligner] = fitted.aligners.values()
    # Too few rows to fit 576 dimensions: put in the map that the twin was made with, h_twin = h Q.
    rotation = load_file(demo_models.twin_same / "rotation.safetensors")["Q"]
    zero = np.zeros(576, np.float32)
    true = {**aligner.tensors, "weight": rotation, "mean_source": zero, "mean_target": zero}
    save_adapter(run, [Aligner(aligner.pair, true)], {k: v for k, v in fitted.card.items() if k != "pairs"})
    adapter = load_adapter(run)

    entry = stitch(open_store(store), adapter, max_tokens=300, quiet=True)["pairs"]["smol:15->twin:15"]
    nats = {name: figures["nats_per_token"] for name, figures in entry["conditions"].items()}
    assert entry["self_bit_identical"]
    assert nats["mapped"] == pytest.approx(nats["clean"], abs=1e-3)
    assert entry["recovered"]["value"] > 0.999
    assert entry["conditions"]["mapped"]["top1"] > 0.98
    assert entry["conditions"]["mapped"]["kl"] < 1e-3
    for control in CONTROLS:
        assert nats[control] > nats["clean"] + 2, control
        assert entry["conditions"][control]["kl"] > 2, control
    # A random direction of the right size tells no more than the mean state does.
    assert entry["conditions"]["random_norm"]["below_mean_ci95"][0] <= 0

    texts = generate(adapter, PROMPTS[:2], max_new_tokens=6, quiet=True)["entries"]
    for text in texts:
        stitched = text["source_to_target"]["smol:15->twin:15"]
        assert stitched["mapped"] == stitched["self"] == text["target_alone"] == text["source_alone"]
        assert stitched["mean"] != text["target_alone"]
        assert stitched["random_norm"] != text["target_alone"]
        nats = text["likelihood"]["source_to_target"]["smol:15->twin:15"]
        assert nats["mapped"] == pytest.approx(text["likelihood"]["target_alone"], abs=1e-3)
        assert nats["random_norm"] > nats["self"] + 0.5
    assert "Paris" in texts[0]["source_to_target"]["smol:15->twin:15"]["mapped"]
