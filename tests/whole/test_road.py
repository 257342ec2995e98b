"""The whole road on the real demo pair, through the commands a user types, against the figures that are right.

The pair's right answer is known: the twin's states are a rotation of the source's. Few documents, so bounds are loose;
`featstore demo` prints the figures on more of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import featstore
from featstore.demo.pair import fetch_assets
from featstore.store.format.elements import bfloat16_values

pytestmark = pytest.mark.demo_pair

KEY, BACK = "smollm2:15->twin:15", "twin:15->smollm2:15"


@pytest.fixture(scope="module")
def corpus(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("road") / "articles.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_texts))
    return path


@pytest.fixture(scope="module")
def road(
    demo_models: SimpleNamespace, corpus: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: Any
) -> SimpleNamespace:
    """Extract, train, compare, stitch, generate, report; each stage's JSON."""
    out = tmp_path_factory.mktemp("road")
    store = out / "road.zarr"

    def run(tool: str, *arguments: str) -> dict[str, Any]:
        done = run_cli(tool, *arguments, "--json")
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    gguf = fetch_assets(demo_models.smollm2.parent / "assets").model
    extracted = run(
        "featstore", "extract", "--model", f"smollm2={gguf}", "--model", f"twin={demo_models.twin}",
        "--layers", "0%,50%", "--dataset", f"jsonl:{corpus}",
        "--max-documents", "40", "--max-document-bytes", "500", "--store", str(store),
    )  # fmt: skip
    runs = {
        type_: run(
            "align",
            "train",
            "--store",
            str(store),
            "--type",
            type_,
            "--both",
            "--layers",
            "15",
            "--out",
            str(out / type_),
        )
        for type_ in ("procrustes", "affine", "lora")
    }
    return SimpleNamespace(
        out=out,
        store=store,
        extracted=extracted,
        runs=runs,
        cka=run("align", "cka", "--store", str(store), "--out", str(out / "cka")),
        compare=run("align", "compare", *(str(out / type_) for type_ in runs)),
        stitch=run(
            "evaluate", "stitch", "--store", str(store), "--adapter", str(out / "procrustes"), "--max-tokens", "500"
        ),
        generate=run("evaluate", "generate", "--adapter", str(out / "procrustes"), "--max-new-tokens", "6"),
        report=run(
            "evaluate", "report", *(str(out / name) for name in (*runs, "cka")), "--out", str(out / "report.html")
        ),
        run=run,
    )


def test_coverage_is_that_of_the_two_tokenizers(road: SimpleNamespace) -> None:
    pairs = road.extracted["pairs"]["smollm2__twin"]
    assert pairs["coverage"]["smollm2"] > 0.95
    assert 0.85 < pairs["coverage"]["twin"] < 0.95
    assert 0 < pairs["masked"] < 0.05 * pairs["pairs"]


def test_procrustes_finds_most_of_the_planted_rotation(road: SimpleNamespace) -> None:
    for key in (KEY, BACK):
        entry = road.runs["procrustes"]["pairs"][key]
        assert entry["test"]["r2"] > 0.75
        assert entry["test"]["retrieval_top1"] > 0.9
        for control in ("mean", "identity", "random_rotation", "shuffled"):
            assert entry["baselines"][control]["r2"] < 0.1, control


def test_lora_stands_beside_its_closed_form(road: SimpleNamespace) -> None:
    for entry in road.runs["lora"]["pairs"].values():
        assert entry["baselines"]["closed_form"]["name"] == "reduced-rank 32 on procrustes"
        assert entry["test"]["r2"] > entry["baselines"]["closed_form"]["r2"] - 0.02
    epoch = json.loads((road.out / "lora" / "eval_epoch_1.json").read_text())
    assert {"epoch", "val_loss", "cka", "cosine_sim", "generations"} <= set(epoch)


def test_cka_is_highest_between_equal_layers(road: SimpleNamespace) -> None:
    cross = np.array(road.cka["cross"])
    assert cross.shape == (2, 2)
    assert (np.diag(cross) > 0.85).all()
    assert cross.argmax(axis=1).tolist() == [0, 1]
    assert np.abs(np.array(road.cka["null"]["cross"])).max() < 0.02
    # The start tokens alone would tell another story: that is why they are masked, and why both are reported.
    assert abs(road.cka["unmasked"]["cross"][1][1] - cross[1, 1]) > 0.1


def test_stitching_recovers_what_no_control_does(road: SimpleNamespace) -> None:
    for key in (KEY, BACK):
        entry = road.stitch["pairs"][key]
        nats = {name: figures["nats_per_token"] for name, figures in entry["conditions"].items()}
        assert entry["self_bit_identical"]
        assert nats["self"] == nats["clean"]
        assert nats["clean"] < nats["mapped"] < min(nats[c] for c in ("mean", "zero", "random_norm", "shuffled", "raw"))
        assert entry["recovered"]["value"] > 0.65
        assert entry["beyond_token"]["nats"] > 0
        assert {name for name, block in entry["controls"].items() if block["nats"] <= 0} == set()
        # Random states as long as the mapped ones are no better than the mean state by more than their interval.
        ends = entry["conditions"]["random_norm"]["below_mean_ci95"]
        assert ends is None or ends[0] <= 0


def test_four_conditions_and_controls_for_five_prompts(road: SimpleNamespace) -> None:
    entries = road.generate["entries"]
    assert len(entries) == 5
    assert "Paris" in entries[0]["source_alone"]
    for entry in entries:
        for role, key in (("source_to_target", KEY), ("target_to_source", BACK)):
            texts = entry[role][key]
            assert set(texts) == {"mapped", "self", "mean", "random_norm", "shuffled"}
            assert texts["self"] == entry["target_alone" if role == "source_to_target" else "source_alone"]
    assert any("Paris" in entry["source_to_target"][KEY]["mapped"] for entry in entries[:1])


def test_the_report_is_one_page_with_all_of_it(road: SimpleNamespace) -> None:
    page = (road.out / "report.html").read_text()
    for text in ("procrustes", "lora", "The capital of France is", KEY.replace("->", "→")):
        assert text in page or text.replace("→", "-&gt;") in page, text
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_leaderboard_names_every_run(road: SimpleNamespace) -> None:
    assert {row["type"] for row in road.compare["rows"]} == {"procrustes", "affine", "lora"}


def test_other_libraries_read_the_same_states(road: SimpleNamespace) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    path = road.store / "models" / "twin" / "resid" / "15"
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, read=True).result()
    theirs = np.asarray(opened[:50].read().result())
    assert theirs.dtype.name == "bfloat16"
    ours = featstore.open_store(road.store).rows("twin", 15)
    np.testing.assert_array_equal(theirs.view(np.uint16), ours.stored(slice(0, 50)))
    np.testing.assert_array_equal(bfloat16_values(theirs.view(np.uint16)), ours[0:50])


def test_the_store_verifies(road: SimpleNamespace) -> None:
    assert road.run("featstore", "verify", str(road.store))["damage"] == []


def test_with_one_tokenizer_the_answer_is_exact_but_for_rounding(
    road: SimpleNamespace, demo_models: SimpleNamespace, corpus: Path
) -> None:
    store = road.out / "same.zarr"
    road.run(
        "featstore", "extract", "--model", f"a={demo_models.smollm2}", "--model", f"b={demo_models.twin_same}",
        "--layers", "15", "--dataset", f"jsonl:{corpus}",
        "--max-documents", "40", "--max-document-bytes", "300", "--store", str(store),
    )  # fmt: skip
    entry = road.run("align", "train", "--store", str(store), "--out", str(road.out / "same"))["pairs"]["a:15->b:15"]
    assert entry["test"]["r2"] > 0.998
    assert entry["test"]["cka_debiased"] > 0.9995
    assert entry["test"]["retrieval_top1"] > 0.99
