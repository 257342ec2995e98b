"""The report: true to the files, safe against what is in them, and clear about what is missing."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluate.reporting import build_report
from evaluate.reporting.reading.inputs import read_runs
from tests.support import report_fixtures as made
from tests.support.drawings import drawings
from tests.support.report_fixtures import page, run_of
from tests.support.similarity_fixture import floors_of


def resolve(root: Path, pointer: str) -> Any:
    name, path = pointer.split("#")
    file = root / name
    if name.endswith(".jsonl"):
        value: Any = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        value = json.loads(file.read_text())
    for key in path.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def agrees(shown: str, value: float) -> bool:
    """Whether the shown digits are the value's, rounded; in percent or plain."""
    text = shown.replace("\u2212", "-").replace(",", "").replace("\u202f", "").rstrip("%")
    mantissa, _, power = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    half = 0.5 * 10.0 ** (int(power or 0) - decimals) * (1 + 1e-9)
    return min(abs(float(text) - value), abs(float(text) - 100 * value)) <= half


def test_page_is_complete_well_formed_and_self_contained(tmp_path: Path) -> None:
    found = page(run_of(tmp_path))
    headings = [attrs["id"] for tag, attrs in found.tags if tag == "section" and "id" in attrs]
    sections = ["summary", "leaderboard", "stitched", "cka", "training", "answers", "texts", "provenance"]
    assert headings == sections
    targets = {value[1:] for value in found.attributes("href") if value.startswith("#")}
    assert targets == {*headings, "warnings"}
    assert found.text.startswith(" ")
    for words in ("smol → twin", "org/twin", "demo.zarr", "2.9.0", "few-rows", "The capital of France"):
        assert words in found.text
    # Names of XML name spaces, which nobody fetches.
    assert set(re.findall(r"https?://[^\"']+", found.html)) <= {f"http://www.w3.org/{end}" for end in NAMESPACES}


def test_every_number_is_the_one_in_its_file(tmp_path: Path) -> None:
    files = {k: v for k, v in made.documents().items() if not k.startswith("eval_epoch")}
    made.write(tmp_path / "logged", files, made.log())
    made.write(tmp_path / "unlogged", {k: made.documents()[k] for k in ("adapter.json", "eval_epoch_1.json")})
    found = page(tmp_path / "logged", tmp_path / "unlogged")
    assert len(found.figures) > 100
    places = set()
    for attrs, shown in found.figures:
        value = resolve(tmp_path, attrs["data-from"])
        assert float(attrs["value"]) == value, attrs
        assert agrees(shown, value), (attrs, shown)
        places.add(attrs["data-from"].split("#")[0])
    names = ("metrics.json", "stitch.json", "cka.json", "log.jsonl", "adapter.json", "generations.json")
    assert {f"logged/{name}" for name in names} <= places
    assert "unlogged/eval_epoch_1.json" in places


def test_every_drawn_mark_says_the_value_in_its_file(tmp_path: Path) -> None:
    found = page(run_of(tmp_path))
    cka = made.cka()
    for i, row in enumerate(cka["cross"]):
        for j, value in enumerate(row):
            name = f"smol {cka['layers']['smol'][i]} × twin {cka['layers']['twin'][j]}: "
            shown = "– (HSIC of twin:15 is not positive)" if value is None else f"{value:.6g}".replace("-", "\u2212")
            assert name + shown in found.titles
    for condition, content in made.stitch()["pairs"][made.PAIR]["conditions"].items():
        if content is not None:
            low, high = content["ci95"]
            name = condition.replace("_", " ")
            assert f"{name}: {content['nats_per_token']:g} [{low:g}, {high:g}]" in found.titles
    for event in made.log()[:3]:
        assert f"validation, epoch {event['epoch']}: {event['val_loss']:.6g}" in found.titles


def test_columns_show_what_their_headings_say(tmp_path: Path) -> None:
    found = page(run_of(tmp_path))
    board = [attrs["data-from"].split("#")[1] for attrs, _ in found.figures]
    metric = f"/pairs/{made.PAIR}"
    figures = ("retrieval_top1", "retrieval_chance", "cosine_centered", "r2_median_dim")
    row = [
        *(f"{metric}/test/r2{k}" for k in ("", "_ci95/0", "_ci95/1")),
        *(f"{metric}/test/partial_r2{k}" for k in ("", "_ci95/0", "_ci95/1")),
        *(f"{metric}/recovered_token/{k}" for k in ("value", "ci95/0", "ci95/1")),
        *(f"{metric}/recovered/{k}" for k in ("value", "ci95/0", "ci95/1")),
        *(f"{metric}/test/{k}" for k in figures),
        f"{metric}/by_mask/kept/r2",
        "/pairs/0/parameters/trainable",
        *(f"{metric}/baselines/closed_form/{k}" for k in ("r2", *figures)),
        *(f"{metric}/baselines/token/{k}" for k in ("r2", *figures)),
        *(f"{metric}/baselines/mean/{k}" for k in ("r2", *figures)),
        *(f"{metric}/baselines/identity/{k}" for k in ("r2", *figures)),
        *(f"{metric}/baselines/random_rotation/{k}" for k in ("r2", *figures)),
        *(f"{metric}/baselines/shuffled/{k}" for k in ("r2", *figures)),
    ]
    start = board.index(row[-1]) - len(row) + 1
    assert board[start : start + len(row)] == row
    headings = re.findall(r'<th scope="col" title="[^"]*"[^>]*>([^<]*)</th>', found.html)
    assert headings == [
        *("run", "layers", "what", "R²", "partial R²", "beyond token", "recovered", "top-1", "chance", "cosine"),
        *("median dim", "with sinks", "trainable", "warnings"),
    ]
    condition = f"{metric}/conditions/mapped"
    losses = [f"{condition}/nats_per_token", f"{condition}/ci95/0", f"{condition}/ci95/1", f"{condition}/bits_per_byte"]
    assert any(board[i : i + 4] == losses for i in range(len(board)))


def test_missing_cells_have_reasons_and_out_of_range_ones_are_not_clamped(tmp_path: Path) -> None:
    cka = made.cka()
    cka["cross"][0][1] = 1.013
    found = page(made.write(tmp_path / "cka", {"cka.json": cka}))
    [spec] = [spec for spec in drawings(found.html) if spec["kind"] == "heat"]
    assert spec["values"] == cka["cross"]
    assert spec["reasons"] == {"1,1": "HSIC of twin:15 is not positive"}
    assert spec["scale"] == {"low": -0.0213, "high": 1.013, "closer": "higher"}


@pytest.mark.parametrize(
    ("stitched", "tag", "lede"),
    [
        (made.stitch(), "beats every control", "Procrustes at smol:15 → twin:15 beats every control"),
        (
            made.stitch(10.9, 0.04, -0.03, (-0.08, 0.01)),
            "does not beat its controls",
            "The map does not beat its controls.",
        ),
        (
            made.stitch(10.2, 0.13, 0.07, (-0.02, 0.15)),
            "not clearly above its controls",
            "The map does not clearly beat its controls.",
        ),
        (made.stitch(12.0, -0.1, -0.2, (-0.3, -0.1)), "does not beat its controls", "does not beat"),
        (made.stitch(12.0, 0.2, None), "does not beat its controls", "does not beat"),
        (made.stitch(4.8, 0.85, None), "controls not compared", "does not clearly beat"),
        (None, "not injected yet", "The map has not been injected into its target yet."),
    ],
)
def test_verdict_follows_the_numbers(tmp_path: Path, stitched: dict[str, Any] | None, tag: str, lede: str) -> None:
    found = page(run_of(tmp_path, stitch=stitched))
    assert tag in found.text
    assert lede in found.text
    good = tag == "beats every control"
    assert ("beats every control" in found.text) is good


def test_summary_sentence_gives_share_interval_and_control(tmp_path: Path) -> None:
    text = page(run_of(tmp_path)).text.replace("\u202f", " ")
    assert (
        "Lowers the loss by 0.90 nats/token [0.70, 1.11] from where the source’s token alone brings it (5.69), "
        "45 % [40, 50] of the way to the clean run (3.70). "
        "Recovers 85 % [82, 88] of the loss between the mean state (11.20 nats/token) and the clean run (3.70). "
        "Every control is beaten; the closest is token (0.90 nats/token [0.70, 1.11])."
    ) in text


def test_a_difference_within_its_interval_is_no_gain(tmp_path: Path) -> None:
    found = page(run_of(tmp_path, stitch=made.stitch(10.2, 0.13, 0.07, (-0.02, 0.15)))).text
    assert "Not told from the source’s token alone (10.27 nats/token): the difference is 0.07" in found
    assert "cannot be told from the source’s token alone" in found
    assert "owers the loss by" not in found


def test_held_out_states_within_the_interval_of_the_token_are_not_above_it(tmp_path: Path) -> None:
    metrics = made.metrics()
    metrics["pairs"][made.PAIR]["test"] |= {"partial_r2": 0.029, "partial_r2_ci95": [-0.057, 0.116]}
    found = page(run_of(tmp_path, metrics=made.judge(metrics))).text
    assert "above the source’s token alone" not in found
    assert "It does not beat the source’s token alone (0.446)." in found
    assert "which does not beat the source’s token alone (0.446)." in found


def test_the_summary_says_both_floors_of_similarity(tmp_path: Path) -> None:
    cka = made.cka() | {"permutations": floors_of(made.cka()["cross"], "higher")}
    summary = page(made.write(tmp_path / "cka", {"cka.json": cka})).text.partition("Leaderboard")[0]
    assert "With documents in each other's place at equal positions, CKA is" in summary
    assert "With partners of the same token in another document, CKA is" in summary


@pytest.mark.parametrize(
    ("r2", "closed", "words"),
    [
        (0.85, 0.8703, "falls short of the closed form (ridge, R² 0.870): suspect the learning rate"),
        (0.868, 0.8703, "Beside it stands the closed form (ridge, R² 0.870)."),
        (0.9, 0.8703, "Beside it stands the closed form (ridge, R² 0.870)."),
        (-0.2, -0.2, "It does not beat the mean state (0.000)."),
    ],
)
def test_held_out_figures_are_judged(tmp_path: Path, r2: float, closed: float, words: str) -> None:
    assert words in page(run_of(tmp_path, metrics=made.metrics(r2, closed))).text


def test_a_closed_form_map_is_not_blamed_for_its_learning_rate(tmp_path: Path) -> None:
    files = {"metrics.json": made.metrics()}
    text = page(made.write(tmp_path / "run", files)).text
    assert "Beside it stands the closed form (ridge, R² 0.870)." in text
    assert "learning rate" not in text


def test_self_injection_that_costs_loss_is_a_warning(tmp_path: Path) -> None:
    text = page(run_of(tmp_path, stitch=made.stitch(self=made.loss(3.76)))).text
    assert "own states is not neutral (clean 3.700, self 3.760 nats/token)" in text


def test_cka_says_where_sinks_decide(tmp_path: Path) -> None:
    text = page(made.write(tmp_path / "cka", {"cka.json": made.cka()})).text
    assert "Most alike are smol layer 0 and twin layer 0: CKA 0.951." in text
    assert "CKA is -0.021 with attention sinks masked and 0.970 with them in" in text
    assert "No map was fitted in this directory" in text


NAMESPACES = ("1999/xhtml", "1999/xlink", "2000/svg", "2000/xmlns/", "XML/1998/namespace")
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7*7 }}'


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    files = {name: poison(content) for name, content in made.documents().items()}
    key = f"{HOSTILE}:1->{HOSTILE}:2"
    for name in ("metrics.json", "stitch.json"):
        files[name]["pairs"] = {key: files[name]["pairs"][made.PAIR]}
    files["cka.json"]["layers"] = {HOSTILE: [HOSTILE, 2]}
    (entry,) = files["generations.json"]["entries"]
    entry["source_to_target"] = {key: {"mapped": HOSTILE, HOSTILE: HOSTILE}}
    files["adapter.json"]["models"] = {HOSTILE: {"reference": HOSTILE}}
    files["adapter.json"]["provenance"] = {"versions": {HOSTILE: HOSTILE}, "seed": HOSTILE}
    events = [dict(event, pair=key, reason=HOSTILE) for event in made.log()]
    directory = made.write(tmp_path / "<b onclick=x>&", files, events)
    found = page(directory)
    assert HOSTILE in found.text
    assert "img" not in {tag for tag, _ in found.tags}


def test_unprintable_text_is_shown_not_swallowed(tmp_path: Path) -> None:
    texts = made.generations()
    texts["entries"][0]["source_alone"] = "a\x00b\x1b[31mc\ud800d\u202ee\r\nf"
    html = page(run_of(tmp_path, generations=texts)).html
    assert "a\u2400b\u241b[31mc\ufffdd\u202ee\nf" in html
    html.encode()


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("adapter", "align train --store STORE --type procrustes --out run"),
        ("metrics", "align train --store STORE --type procrustes --out run"),
        ("stitch", "evaluate stitch --store STORE --adapter run"),
        ("generations", "evaluate generate --adapter run"),
        ("cka", "align cka --store STORE --out DIR"),
    ],
)
def test_a_missing_file_names_the_command_that_writes_it(tmp_path: Path, lost: str, words: str) -> None:
    text = page(run_of(tmp_path, **{lost: None})).text
    assert f"No {lost}.json: {words} writes it." in text


@pytest.mark.parametrize("only", ["adapter", "metrics", "stitch", "generations", "cka"])
def test_any_one_file_is_enough(tmp_path: Path, only: str) -> None:
    name = f"{only}.json"
    page(made.write(tmp_path / "run", {name: made.documents()[name]}))
    page(made.write(tmp_path / "empty", {name: {}}))


def test_null_figures_are_dashes_with_the_reason(tmp_path: Path) -> None:
    scored = made.metrics()
    scored["pairs"][made.PAIR]["test"]["cosine_centered"] = None
    scored["pairs"][made.PAIR]["baselines"]["identity"] = None
    scored["pairs"][made.PAIR]["reasons"] = {
        "test.cosine_centered": "no rows were kept",
        "baselines.identity": "widths differ",
    }
    found = page(run_of(tmp_path, metrics=scored))
    reasons = {attrs["title"] for _, attrs in found.tags if attrs.get("class") == "none"}
    assert {"no rows were kept", "widths differ", "widths differ (576 and 960)"} <= reasons


def test_nan_and_infinity_count_as_null(tmp_path: Path) -> None:
    directory = run_of(tmp_path)
    text = (directory / "metrics.json").read_text().replace("0.861", "NaN").replace("-1.2", "1e999")
    (directory / "metrics.json").write_text(text)
    found = page(directory)
    assert "nan" not in {value.lower() for value in found.attributes("value")}
    assert all(math.isfinite(float(value)) for value in found.attributes("value"))


_DAMAGE = [None, "x", [], {}, True, 1.7e308, -1.7e308, 1e-320, -5, 10**400, [[None]], {"a": 1}]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def test_any_damaged_value_still_gives_a_page(tmp_path: Path) -> None:
    whole = made.documents() | {"cka.json": made.measured()}
    whole["metrics.json"]["pairs"][made.PAIR] |= made.compressed()["metrics.json"]["pairs"][made.PAIR]
    places = [path for path in _places(whole) if len(path) > 1]
    rng = random.Random(0)
    for trial in range(60):
        files = copy.deepcopy(whole)
        for path in rng.sample(places, 8):
            here: Any = files
            for key in path[:-1]:
                here = here[key] if isinstance(here, list | dict) and _has(here, key) else None
            if isinstance(here, dict | list) and _has(here, path[-1]):
                here[path[-1]] = rng.choice(_DAMAGE)
        page(made.write(tmp_path / f"run{trial}", files, made.log()))


def _has(here: Any, key: Any) -> bool:
    return key in here if isinstance(here, dict) else isinstance(key, int) and key < len(here)


def test_several_directories_share_one_page(tmp_path: Path) -> None:
    other = made.adapter("lora") | {"store": {"path": "b.zarr", "fingerprint": "ffff"}}
    found = page(
        run_of(tmp_path, "one"),
        run_of(tmp_path, "two", adapter=other, stitch=made.stitch(10.9, 0.04, -0.03), cka=None),
        made.write(tmp_path / "similar", {"cka.json": made.cka()}),
        tmp_path / "one",
    )
    assert "1 of 2 injected maps beats every control. The one with the highest validation R², Procrustes" in found.text
    assert "different stores" in found.text
    # Once in the answer at the top, once as a warning that holds for both.
    assert found.text.count("few-rows") == 2
    html = found.html.split('id="stitched"')[0]
    rows = re.findall(r'<tr class="(\w+)"[^>]*><td class="name" data-sort="(\w+)">', html)
    # From different stores nothing is shared, however equal the digits.
    assert rows[:4] == [("map", "one"), ("map", "two"), ("closed", "one"), ("closed", "two")]
    assert rows[4:] == [("control", "one"), ("control", "two")] * 5
    assert "2 of" not in found.text


def test_bad_news_never_folds_away(tmp_path: Path) -> None:
    keys = [f"smol:{k}->twin:{k}" for k in range(9)]
    stitched = made.stitch()
    good, bad = stitched["pairs"][made.PAIR], made.stitch(11.0, 0.02, -0.1)["pairs"][made.PAIR]
    stitched["pairs"] = dict.fromkeys(keys, good) | {keys[8]: bad}
    html = page(made.write(tmp_path / "run", {"stitch.json": stitched})).html
    summary = html.split('id="leaderboard"')[0]
    shown, folded = summary.split("<details>")
    assert shown.count("verdict good") == 4
    assert shown.count("verdict poor") == 1
    assert folded.count("verdict good") == 4
    assert "Recovered of what the token alone leaves, by source layer" in html


def test_labels_tell_equal_names_apart_without_machine_paths(tmp_path: Path) -> None:
    first, second = run_of(tmp_path / "a"), run_of(tmp_path / "b")
    assert [run.label for run in read_runs([first, second])] == ["a/run", "b/run"]
    html = build_report([first, second])
    assert str(tmp_path) not in html
    assert "/srv/private" not in html


def test_texts_point_out_what_equals_a_control(tmp_path: Path) -> None:
    text = page(run_of(tmp_path)).text
    assert "the same as without injection" in text
    assert "the same as control: shuffled" in text
    assert "greedy, at most 32 new tokens" in text


def test_training_says_how_it_ended(tmp_path: Path) -> None:
    text = page(run_of(tmp_path)).text
    assert "Stopped at epoch 3: no gain of 0.001 in 2 epochs. Kept is epoch 2." in text
    assert "1 − R² = 0.130 (R² 0.870)" in text


def test_a_log_cut_short_is_read_and_said(tmp_path: Path) -> None:
    directory = run_of(tmp_path)
    with (directory / "log.jsonl").open("a") as stream:
        stream.write('{"event": "epo')
    assert "log.jsonl ends in half a line" in page(directory).text
