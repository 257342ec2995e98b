"""Stitched loss: what is replaced, what is scored, and how a perfect map, no map and the controls come out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.maps.fitted import Aligner, load_adapter, save_adapter
from align.runs.train import train
from align.settings import Settings
from align.tokens.table import TokenTable
from evaluate.injection.controls import CONTROLS
from evaluate.injection.loading import Models
from evaluate.injection.positions import source_positions
from evaluate.results import read_stitch_documents
from evaluate.stitching.findings import findings
from evaluate.stitching.stitch import CONDITIONS, describe, stitch
from evaluate.stitching.windows import Window, scored_windows
from featstore.errors import AdapterError, PairingError, SpecError
from featstore.models.loading import load_model
from featstore.models.references import ModelSpec
from featstore.runtime.console import jsonable
from featstore.store import Store, open_store
from featstore.text.splits import TEST
from tests.support.commands import call, strict_json
from tests.support.token_tables import what_the_map_makes_of_tokens, write_table

#: Enough for windows of both test documents.
TOKENS = 600


def extracted(path: Path, corpus: Path, *models: str, layers: tuple[str, ...], form: str = "float32") -> Path:
    from featstore.extraction.job import prepare
    from featstore.extraction.run import extract
    from featstore.extraction.settings import Settings as Extraction

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
    adapter = load_adapter(base / "run")
    return SimpleNamespace(store=open_store(store), run=base / "run", adapter=adapter)


@pytest.fixture(scope="module")
def pair(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Maps between two models of different width, depth and tokenizer, in both directions."""
    run = tmp_path_factory.mktemp("pair") / "run"
    train(Settings(str(tiny_store), "affine", both=True), run, quiet=True)
    adapter = load_adapter(run)
    store = open_store(tiny_store)
    return SimpleNamespace(
        store=store, run=run, adapter=adapter, result=stitch(store, adapter, max_tokens=TOKENS, quiet=True)
    )


@pytest.fixture(scope="module")
def ceiling(itself: SimpleNamespace) -> dict[str, Any]:
    return stitch(itself.store, itself.adapter, max_tokens=TOKENS, quiet=True)


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
        assert "raw" not in entry["controls"]


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
    assert clean["ci95"] is None


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
        assert entry["reasons"]["raw"] == f"widths differ ({widths})"
        for name in set(CONDITIONS) - {"raw"}:
            figures = entry["conditions"][name]
            # The tiny store has two test documents: too few for an interval, and the file says so.
            assert figures["ci95"] is None
            assert (name in entry["controls"]) == (name in CONTROLS)
        assert entry["self_bit_identical"]
        assert entry["conditions"]["self"] == entry["conditions"]["clean"]
        assert 0.5 < entry["replaced_share"] <= 1
        assert 1 < entry["effective_documents"] <= entry["n_documents"] == 2
        assert "at least 3 test documents, not 2" in entry["reasons"]["ci95"]
        assert [found["code"] for found in entry["warnings"]][:1] == ["few-documents"]
    strict_json(json.dumps(jsonable(pair.result)))


def test_a_map_that_is_the_table_of_tokens_adds_nothing_to_it(pair: SimpleNamespace, tmp_path: Path) -> None:
    # At layer 0 a state is its token, and so is what any map makes of it.
    key = "llama:0->mistral:0"
    aligner = pair.adapter.aligners[key]
    write_table(tmp_path, pair.adapter, key, what_the_map_makes_of_tokens(pair.store, aligner))
    planted = replace(pair.adapter, directory=tmp_path, aligners={key: aligner})
    entry = stitch(pair.store, planted, max_tokens=TOKENS, quiet=True)["pairs"][key]
    mapped, token = (entry["conditions"][name] for name in ("mapped", "token"))
    assert token["nats_per_token"] == pytest.approx(mapped["nats_per_token"], abs=1e-5)
    assert entry["beyond_token"]["nats"] == pytest.approx(0, abs=1e-5)
    assert not entry["beats_every_control"]
    share = entry["recovered_token"]["value"]
    assert share is None or share == pytest.approx(0, abs=1e-2)
    # The run's own table is another one: the mean state of each token, not what a map makes of it.
    own = pair.result["pairs"][key]
    assert own["conditions"]["mapped"] == mapped
    assert own["conditions"]["token"] != token


def test_a_run_without_a_table_says_that_it_has_none(pair: SimpleNamespace, tmp_path: Path) -> None:
    key, options = "llama:2->mistral:2", {"layers": "2", "max_tokens": 1, "quiet": True}
    adapter = replace(pair.adapter, directory=tmp_path, aligners={key: pair.adapter.aligners[key]})
    entry = stitch(pair.store, adapter, **options)["pairs"][key]
    assert entry["conditions"]["token"] is None
    for name in ("token", "beyond_token", "recovered_token"):
        assert "the run has no tokens.safetensors: it was made by an earlier version" in entry["reasons"][name]
    # A table of another layer, one of another width, and a damaged one.
    narrow = TokenTable(np.arange(2), np.zeros((2, 5), np.float32), np.zeros(5, np.float32))
    write_table(tmp_path, pair.adapter, "llama:3->mistral:4", narrow)
    entry = stitch(pair.store, adapter, **options)["pairs"][key]
    assert entry["reasons"]["token"] == "tokens.safetensors of the run has no predictions for llama:2->mistral:2"
    write_table(tmp_path, pair.adapter, key, narrow)
    with pytest.raises(AdapterError, match="have width 5, the map gives 32"):
        stitch(pair.store, adapter, **options)
    (tmp_path / "tokens.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="is damaged"):
        stitch(pair.store, adapter, **options)


def test_controls_may_be_chosen_and_change_nothing_else(pair: SimpleNamespace) -> None:
    options: dict[str, Any] = {"layers": "2", "max_tokens": 150, "quiet": True}
    everything, some = (
        jsonable(stitch(pair.store, pair.adapter, **options, **chosen))["pairs"]["llama:2->mistral:2"]
        for chosen in ({}, {"controls": ("mean", "shuffled")})
    )
    for name in ("clean", "self", "mapped", "mean", "shuffled"):
        assert some["conditions"][name] == everything["conditions"][name]
    assert {name for name, reason in some["reasons"].items() if reason == "not asked for"} == {
        *("token", "zero", "random_norm", "random_rotation", "raw", "beyond_token", "recovered_token"),
    }
    assert all(some["conditions"][name] is None for name in ("token", "zero", "random_norm", "random_rotation", "raw"))
    assert some["recovered"] == everything["recovered"]
    assert some["controls"] == {name: everything["controls"][name] for name in some["controls"]}
    # What was not run is not beaten; within a single document there are no others to take states from.
    assert "mean" in some["controls"]
    assert set(some["controls"]) <= {"mean", "shuffled"}
    assert not some["beats_every_control"]
    assert some["reasons"]["beyond_token"] == "not asked for"
    for wrong in (("shuffled",), ("mean", "noise")):
        with pytest.raises(SpecError, match="choose mean and any of"):
            stitch(pair.store, pair.adapter, controls=wrong, **options)


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
        stitch(pair.store, pair.adapter, layers="2", max_tokens=TOKENS, seed=seed, quiet=True)["pairs"]
        for seed in (0, 1)
    )
    for key in again:
        one, two = again[key]["conditions"], other[key]["conditions"]
        assert one == pair.result["pairs"][key]["conditions"]
        for name in ("clean", "self", "mapped", "token", "mean", "zero"):
            assert one[name] == two[name], name
        for name in ("random_norm", "random_rotation", "shuffled"):
            assert one[name] != two[name], name


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
    import evaluate.stitching.conditions as module
    import evaluate.stitching.stitch as whole_run

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
    monkeypatch.setattr(whole_run, "scored_windows", lambda *_, **__: [window])
    [entry] = stitch(itself.store, itself.adapter, layers="1", quiet=True)["pairs"].values()
    # The target's own states, in a pass of their own; then all conditions in one.
    (own, _), (given, _) = seen
    assert [layer for _, layer in seen] == [1, 1]
    assert own.shape == (1, *given.shape[1:])
    for hidden in given:
        assert torch.equal(hidden[7], own[0, 7])
    zeros = [hidden for hidden in given if not hidden[window.taken >= 0].any()]
    assert len(zeros) == 1
    assert len(given) == sum(block is not None for block in entry["conditions"].values()) - len(("clean", "self"))


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
    import evaluate.stitching.conditions as module

    seen: list[str] = []
    original = module.inject

    def spy(stream: Any, injection: Any, *, whole: bool) -> Any:
        seen.append(injection.keep)
        return original(stream, injection, whole=whole)

    monkeypatch.setattr(module, "inject", spy)
    result = stitch(pair.store, pair.adapter, layers="2", max_tokens=1, keep="hide", quiet=True)
    assert result["keep"] == "hide"
    # The last pass has a row for every other condition.
    assert seen == ["hide", "own", "hide"] * 2
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
    loads: list[str] = []
    original = Models.load

    def counted(needed: Models, name: str) -> Any:
        loads.append(name)
        return original(needed, name)

    monkeypatch.setattr(Models, "load", counted)
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


# The command.


def test_the_command_writes_what_it_prints(
    pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("evaluate", "stitch", "--store", pair.store.path, "--adapter", pair.run, "--layers", "2")
    shown = call(capsys, *base, "--max-tokens", str(TOKENS), "--out", tmp_path, "--json").json
    assert shown == strict_json((tmp_path / "stitch.json").read_text())
    expected = strict_json(json.dumps(jsonable(pair.result)))["pairs"]
    assert shown["pairs"] == {key: expected[key] for key in ("llama:2->mistral:2", "mistral:2->llama:2")}
    assert not (pair.run / "stitch.json").exists()
    sums = read_stitch_documents(tmp_path)
    for key, entry in shown["pairs"].items():
        own = sums.pairs[key]
        assert len(own.documents) == entry["n_documents"]
        for name, block in entry["conditions"].items():
            if block is None:
                assert name not in own.nats
                continue
            assert sum(own.nats[name]) / sum(own.tokens) == pytest.approx(block["nats_per_token"])
    assert len(sums.to_pandas()) == sum(len(own.nats) * len(own.documents) for own in sums.pairs.values())
    text = call(capsys, *base, "--max-tokens", "200", "--out", tmp_path).out
    assert "llama:2->mistral:2" in text
    assert "nats/token" in text
    assert "recovered" in text


def test_people_are_warned_when_self_injection_is_not_exact(pair: SimpleNamespace) -> None:
    result = jsonable(pair.result)
    words = "injecting the target's own states is not neutral"
    assert words not in describe(result)
    key, entry = next(iter(result["pairs"].items()))
    entry["self_bit_identical"] = False
    entry["warnings"] = list(findings(key, entry))
    assert words in describe(result)


# On the real pair.


@pytest.mark.demo_pair
def test_the_true_map_between_the_real_models_loses_nothing(
    demo_models: SimpleNamespace, sample_texts: list[str], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    from evaluate.generation.generate import PROMPTS, generate

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
    assert nats["token"] > nats["clean"]
    for control in CONTROLS[1:]:
        assert nats[control] > nats["clean"] + 2, control
        assert entry["conditions"][control]["kl"] > 2, control
    # A random direction of the right size tells no more than the mean state does.
    ends = entry["conditions"]["random_norm"]["below_mean_ci95"]
    assert ends is None or ends[0] <= 0

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
