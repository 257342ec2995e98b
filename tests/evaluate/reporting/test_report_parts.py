"""The report's parts: refusing what is no run, shortening numbers, remembering where a value came from."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from evaluate.reporting import build_report, write_report
from evaluate.reporting.reading.inputs import Node, read_runs
from evaluate.reporting.reading.numbers import fixed, percent
from evaluate.reporting.sections import communicate
from evaluate.reporting.sections.texts import differing
from featstore.errors import AdapterError, CorruptDataError, SpecError, WriteError
from tests.support import report_fixtures as made
from tests.support.drawings import drawing, drawings, marks
from tests.support.report_fixtures import page, run_of


def layered(tmp_path: Path, name: str = "layers", *, layers: tuple[int, ...] = (0, 15, 30)) -> Path:
    """A run at several layers whose figures grow with the layer."""
    scored, spliced = made.metrics(), made.stitch()
    keys = [f"smol:{k}->twin:{k}" for k in layers]
    scored["pairs"] = {
        key: made.metrics(0.5 + k / 100)["pairs"][made.PAIR] for key, k in zip(keys, layers, strict=True)
    }
    spliced["pairs"] = {
        key: made.stitch(6 - k / 20, 0.6 + k / 100, 0.5 + k / 100)["pairs"][made.PAIR]
        for key, k in zip(keys, layers, strict=True)
    }
    return made.write(tmp_path / name, {"metrics.json": scored, "stitch.json": spliced})


def full(tmp_path: Path) -> list[Path]:
    """Directories of every kind, a sweep among them."""
    sweep = tmp_path / "sweep"
    for latents in (4, 8):
        made.write(sweep / f"compress-m{latents}", made.compressed(latents, 0.4 + latents / 40))
    cells = [{"name": "compress-m8", "status": "done"}, {"name": "compress-m4", "status": "done"}]
    cells.append({"name": "compress-m16", "status": "failed", "error": "/srv/private/a.zarr: no space"})
    (sweep / "sweep.json").write_text(json.dumps({"grid": {}, "cells": cells}))
    similar = made.write(tmp_path / "similar", {"cka.json": made.measured()})
    (similar / "cka.html").write_text("<!doctype html><title>cka</title>")
    return [run_of(tmp_path), layered(tmp_path), similar, sweep]


def test_directory_without_known_files_names_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(AdapterError) as caught:
        build_report([tmp_path])
    assert str(tmp_path) in str(caught.value)
    for name in ("metrics.json", "cka.json", "stitch.json", "generations.json", "adapter.json"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere does not exist"):
        build_report([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="file is not a directory"):
        build_report([tmp_path / "file"])
    with pytest.raises(AdapterError, match="at least one"):
        build_report([])
    with pytest.raises(SpecError, match="is a directory"):
        write_report([run_of(tmp_path)], tmp_path)
    with pytest.raises(WriteError, match=r"cannot write .*file \(File exists\)|cannot write .*Not a directory"):
        write_report([tmp_path / "run"], tmp_path / "file" / "report.html")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"", b"[" * 100_000])
@pytest.mark.parametrize("name", ["metrics.json", "stitch.json", "eval_epoch_1.json"])
def test_unreadable_json_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    directory = run_of(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(CorruptDataError, match=re.escape(name)):
        build_report([directory])


def test_damage_inside_the_log_names_file_and_line(tmp_path: Path) -> None:
    directory = run_of(tmp_path)
    (directory / "log.jsonl").write_text('{"event": "epoch"}\n{broken\n{"event": "stop"}\n')
    with pytest.raises(CorruptDataError, match=r"log\.jsonl, line 2"):
        build_report([directory])


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.8612, 3, "0.861"),
        (0.99964, 3, "0.9996"),
        (1.0, 3, "1.000"),
        (0.0, 2, "0.00"),
        (-0.0004, 3, "\u22120.0004"),
        (-1.1e-9, 3, "0.000"),
        (-123456.0, 2, "\u22121.2e+05"),
        (12043.0, 0, "12,043"),
    ],
)
def test_rounding_never_claims_an_exact_zero_or_one(value: float, decimals: int, text: str) -> None:
    assert fixed(value, decimals) == text


def test_percent_never_claims_all_or_nothing() -> None:
    shown = [percent(v).replace("\u202f", " ") for v in (1.0, 0.9996, 0.0, 0.00195, 0.85, -0.1)]
    assert shown == ["100 %", "99.96 %", "0 %", "0.2 %", "85 %", "\u221210 %"]


def test_a_node_remembers_where_it_was_read() -> None:
    node = Node({"a/b": [{"c~d": 1.5}]}, "run/x.json#").get("a/b", 0, "c~d")
    assert (node.number, node.at) == (1.5, "run/x.json#/a~1b/0/c~0d")
    assert Node({"a": 1}).get("b", "c", 3).value is None
    assert Node(10**400).number is None
    assert Node(True).number is None


@pytest.mark.parametrize("place", ["report.html", "deep/er/report.html", "odd # dir?/report.html"])
def test_every_number_links_to_the_file_it_came_from(tmp_path: Path, place: str) -> None:
    runs = [run_of(tmp_path, "a:b #1 100%"), *full(tmp_path)]
    out = tmp_path / place
    write_report(runs, out)
    found = made.Page(out.read_text())
    found.check()
    html = found.html
    links = re.findall(r'<a class="n" href="([^"]+)"[^>]*><data value="[^"]+" data-from="([^"]+)"', html)
    assert len(links) > 200
    assert len(links) == html.count("<data ")
    for href, origin in links:
        assert not set(href) & set(" #?")
        file = (out.parent / unquote(href)).resolve()
        assert str(file).endswith("/" + origin.split("#/")[0])
        assert file.is_file()
    for href in set(re.findall(r'href="(\.[^"]+)"', html)):
        assert (out.parent / unquote(href)).is_file()
    assert "similar/cka.html" in html
    assert "href=" not in re.sub(r'href="[#d][^"]*"', "", build_report(runs))


def test_a_number_says_file_and_key_path(tmp_path: Path) -> None:
    html = page(run_of(tmp_path)).html
    assert '<data value="0.861" data-from="run/metrics.json#/pairs/smol:15-&gt;twin:15/test/r2">0.861</data>' in html


def test_a_sweep_stands_for_its_runs(tmp_path: Path) -> None:
    sweep = full(tmp_path)[-1]
    labels = [run.label for run in read_runs([sweep, sweep / "compress-m4"])]
    assert labels == ["compress-m8", "compress-m4"]
    text = page(sweep).text
    assert "failed-cell sweep/compress-m16: a.zarr: no space" in text
    assert "/srv" not in text
    (sweep / "compress-m4" / "metrics.json").unlink()
    (sweep / "compress-m4" / "stitch.json").unlink()
    assert "unfinished-cell sweep/compress-m4 has no figures yet" in page(sweep).text
    with pytest.raises(AdapterError, match="without a finished run"):
        read_runs([made.write(tmp_path / "begun", {"sweep.json": {"cells": []}})])


@pytest.mark.parametrize(
    ("text", "own", "marked"),
    [
        ("Paris. It is", "Paris. It is", []),
        ("Paris. It was", "Paris. It is", ["was"]),
        ("find one  ball that can", "find many coins that can", ["one  ball"]),
        ("Paris, not Rome", "Paris. Rome", [", not"]),
        ("Rome", "Paris", ["Rome"]),
        ("it is\n\nso", "it is so", []),
        ("a b", "", ["a b"]),
        (" Rome ", "Paris", ["Rome"]),
    ],
)
def test_words_that_differ_are_marked(text: str, own: str, marked: list[str]) -> None:
    assert [part for part, differs in differing(text, own) if differs] == marked


def test_marked_and_unmarked_words_are_the_text() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text, own = (
            "".join(rng.choices(["a", "b", "ca", " ", "  ", "\n", ".", "é"], k=rng.randrange(12))) for _ in "ab"
        )
        parts = differing(text, own)
        assert "".join(part for part, _ in parts) == text
        assert all(part for part, _ in parts)
        assert all(a[1] != b[1] for a, b in itertools.pairwise(parts))


def test_texts_are_compared_with_the_writer_and_runs_that_agree_share_a_card(tmp_path: Path) -> None:
    texts = made.generations()
    texts["entries"][0]["source_to_target"][made.PAIR]["mapped"] = " Paris. It was"
    costs = {"mapped": 1.2345, "mean": 8.5}
    texts["entries"][0]["likelihood"] = {"target_alone": 0.9, "source_to_target": {made.PAIR: costs}}
    texts["entries"][0]["source_to_target"][made.PAIR]["likelihood"] = {"mapped": 1.5}
    html = page(run_of(tmp_path, "a", generations=texts), run_of(tmp_path, "b", generations=texts)).html
    section = html.split('id="texts"')[1].split('id="provenance"')[0]
    assert section.count("Paris. It <mark>was</mark>") == 1
    assert section.count('<span class="run">a, b</span>') == 2
    assert "<dt>likelihood</dt>" not in section
    plain = page(tmp_path / "a").text
    assert "its writer’s own text: 1.23 nats/token" in plain
    assert "mean, 8.50 nats/token" in plain
    costs["mapped"] = 1.3
    assert page(tmp_path / "a", run_of(tmp_path, "c", generations=texts)).html.count("Paris. It <mark>was</mark>") == 2
    # What goes back is compared with the source's own text.
    assert "<mark>a list of albums</mark>" in section


def test_closed_forms_and_controls_that_runs_share_are_one_row(tmp_path: Path) -> None:
    other = made.metrics(0.5)
    other["pairs"][made.PAIR]["baselines"] |= {"shuffled": made.block(-0.3), "identity": None, "closed_form": None}
    found = page(run_of(tmp_path, "one"), run_of(tmp_path, "two", metrics=other))
    html = found.html.split('id="stitched"')[0]
    rows = re.findall(r'<tr class="(\w+)"[^>]*><td class="name" data-sort="(\w+)">.*?</tr>', html)
    names = re.findall(r'<td data-sort="((?:closed|control)[^"]*)">', html)
    assert rows[:3] == [("map", "one"), ("map", "two"), ("closed", "one")]
    assert names == [
        "closed form: ridge",
        *(
            f"control: {name}"
            for name in ("token", "mean", "identity", "identity", "random rotation", "shuffled", "shuffled")
        ),
    ]
    assert found.text.count("one and 1 more") == 3


def plot_of(html: str, label: str) -> list[tuple[str, float, float]]:
    """What every mark of a line chart says, its place along the axis and its value."""
    return [(says, x, value) for says, x, value in marks(drawing(html, label)) if x is not None]


def test_curves_over_layers_lie_where_their_values_are(tmp_path: Path) -> None:
    html = page(layered(tmp_path), run_of(tmp_path)).html
    loss = plot_of(html, "Procrustes, smol → twin: loss by layer, layers")
    assert {title.split(",")[0] for title, _, _ in loss} == {
        *("mapped", "clean", "token", "mean", "zero", "random norm", "random rotation", "shuffled")
    }
    found = {title.split(": ")[0]: (x, y) for title, x, y in loss}
    mapped = [found[f"mapped, smol:{k} → twin:{k}"] for k in (0, 15, 30)]
    assert mapped[1][0] - mapped[0][0] == pytest.approx(mapped[2][0] - mapped[1][0], abs=0.02)
    clean, mean = found["clean, smol:0 → twin:0"][1], found["mean, smol:0 → twin:0"][1]
    for (_, y), value in zip(mapped, (6.0, 5.25, 4.5), strict=True):
        assert (clean - y) / (clean - mean) == pytest.approx((value - 3.7) / (11.2 - 3.7), abs=1e-3)
    shares = [t for t, _, _ in plot_of(html, "Procrustes, smol → twin: recovered by layer, layers")]
    assert "from the mean state, smol:30 → twin:30: 0.9 [0.8213, 0.8822]" in shares
    # 0.8 of 4.5 + 0.8 - 3.7.
    assert "from the token alone, smol:30 → twin:30: 0.5 [0.45, 0.55]" in shares
    assert "by layer, run" not in html


def test_rates_lie_on_a_logarithmic_axis_and_the_stitched_rate_counts(tmp_path: Path) -> None:
    runs = [made.write(tmp_path / f"m{m}", made.compressed(m, 0.4 + m / 40, 7 - m / 8)) for m in (8, 4, 16)]
    found = page(*runs)
    kept = plot_of(found.html, "Held-out R² against rate, smol:15 → twin:15")
    own = [(title, x) for title, x, _ in kept if " compress," in title]
    assert [title for title, _ in own] == [f"m{m}, compress, {m}×16: {0.4 + m / 40:g}" for m in (4, 8, 16)]
    assert own[1][1] - own[0][1] == pytest.approx(own[2][1] - own[1][1], abs=0.02)
    stitched = [title for title, _, _ in plot_of(found.html, "Stitched loss against rate, smol:15 → twin:15")]
    assert "m16, mapped, 16×16: 5 [4.79, 5.21]" in stitched
    rates = [attrs["data-from"] for attrs, _ in found.figures if "per_text_byte" in attrs["data-from"]]
    assert rates == [f"m{m}/stitch.json#/pairs/{made.PAIR}/rate/latent_bytes_per_text_byte" for m in (4, 8, 16)]
    files = made.compressed(4)
    files["stitch.json"]["pairs"][made.PAIR]["rate"] = 0.5
    assert "0.500" in page(made.write(tmp_path / "plain", files)).text
    assert 'id="rates"' not in page(run_of(tmp_path)).html


def answers(change: dict[str, Any], *without: str) -> str:
    result = copy.deepcopy(made.communicated())
    conditions = result["tasks"]["countries"]["conditions"]
    for name, (accuracy, *ends) in change.items():
        conditions[name] = {"accuracy": accuracy, "ci95": ends or None}
    for name in without:
        del conditions[name]
    (run,) = [Node(result, "run/communicate.json#")]
    return str(communicate._words(run.get("tasks", "countries")).striptags()).replace("\u202f", " ")


def test_answers_without_gains_are_not_judged() -> None:
    start = "Sent as aligned: 82 % of 50 questions right [69, 90]; the text itself gives 96 %, "
    start += "the question alone 4 %, guessing 2 %. "
    beside = "; the file compares none with it question by question."
    assert answers({}) == f"{start}The highest control is random (6 %){beside}"
    assert answers({"shuffled": (0.6, 0.5, 0.7)}) == f"{start}The highest control is shuffled (60 %){beside}"
    assert answers({"silent": (0.9, 0.8, 0.95)}).endswith(f"The highest control is silent (90 %){beside}")
    assert answers({}, "random", "silent").endswith(
        "No control was run, so nothing shows that the states carried the answer."
    )
    # What was right most often is not quoted for that.
    assert answers({"replace smol:15->twin:15": (0.9, 0.8, 0.95)}).startswith("Sent as aligned: 82 %")
    assert answers({"aligned_shuffled": (0.9, 0.8, 0.95)}).endswith(
        f"The highest control is aligned shuffled (90 %){beside}"
    )
    assert answers({}, "aligned", "replace") == "No map answered any question."


def test_communication_shows_bytes_and_its_warnings(tmp_path: Path) -> None:
    found = page(made.write(tmp_path / "run", {"communicate.json": made.communicated()}))
    assert "x only 50 examples" in found.text
    assert "warning names repeat" in found.text
    assert "aligned: 0.82 [0.69, 0.9]" in found.titles
    assert "Share of right answers, countries, all conditions, run" in found.attributes("aria-label")
    row = [shown for attrs, shown in found.figures if attrs["data-from"].endswith(("aligned/bytes", "text/bytes"))]
    assert row == ["38.4", "11,520"]
    assert (
        "evaluate communicate --adapter RUN --task countries writes communicate.json"
        in page(run_of(tmp_path, "silent", communicate=None)).text
    )


def test_the_report_leaves_every_other_matrix_to_the_similarity_page(tmp_path: Path) -> None:
    directory = made.write(tmp_path / "cka", {"cka.json": made.measured()})
    found = page(directory)
    [one] = [spec for spec in drawings(found.html) if spec["kind"] == "heat"]
    assert one["values"] == made.measured()["cross"]
    assert "align cka --store STORE --out DIR writes a page with every measure" in found.text
    (directory / "cka.html").write_text("<!doctype html>")
    found = page(directory, base=tmp_path)
    assert "./cka/cka.html" in found.attributes("href")
    assert "stands on the similarity page" in found.text


def test_training_draws_what_the_epoch_files_add(tmp_path: Path) -> None:
    found = page(run_of(tmp_path))
    assert "cosine, epoch 2: 0.91" in found.titles
    assert "CKA, epoch 1: 0.9" in found.titles
    assert "from run/log.jsonl, run/eval_epoch_1.json, run/eval_epoch_2.json" in found.text


def test_every_layer_pair_has_its_answers_drawn_beside_what_needs_none(tmp_path: Path) -> None:
    result = made.communicated()
    conditions = result["tasks"]["countries"]["conditions"]
    for k in (0, 15):
        conditions[f"aligned smol:{k}->random:{k}"] = conditions["aligned"] | {"accuracy": 0.5 + k / 100}
        conditions[f"aligned-random smol:{k}->random:{k}"] = conditions["random"]
    del conditions["aligned"], conditions["replace"], conditions["random"]
    found = page(made.write(tmp_path / "run", {"communicate.json": result}))
    assert "Sent as aligned smol:0 → random:0: 50 %" in found.text.replace("\u202f", " ")
    # Of several layer pairs validation chooses, whatever the answers are.
    scored = {f"smol:{k}->random:{k}": {"test": {}, "val": {"r2": r2}} for k, r2 in ((0, 0.2), (15, 0.3))}
    told = {"communicate.json": result, "metrics.json": {"type": "affine", "pairs": scored}}
    text = page(made.write(tmp_path / "validated", told)).text.replace("\u202f", " ")
    assert "Sent as aligned smol:15 → random:15 (the layer pair of the highest validation R²): 65 %" in text
    assert "The highest control is aligned-random smol:0 → random:0 (6 %)" in found.text.replace("\u202f", " ")
    for k in (0, 15):
        label = f"Share of right answers, countries, smol:{k} → random:{k}, run"
        titles = [says.split(": 0.")[0] for says, _, _ in marks(drawing(found.html, label))]
        pair = f"smol:{k} → random:{k}"
        assert titles == ["silent", "text", f"aligned {pair}", f"aligned-random {pair}"]


def test_stitched_losses_show_what_else_was_measured(tmp_path: Path) -> None:
    files = made.stitch()
    files["pairs"][made.PAIR]["conditions"]["mapped"] |= {"kl": 1.25, "top1": 0.5}
    found = page(run_of(tmp_path, stitch=files))
    assert "KL from clean" in found.text
    assert [shown for attrs, shown in found.figures if attrs["data-from"].endswith("mapped/kl")] == ["1.250"]
    assert "KL from clean" not in page(run_of(tmp_path, "plain")).text


def test_same_files_same_bytes_and_atomic(tmp_path: Path) -> None:
    directory, out = run_of(tmp_path), tmp_path / "deep" / "report.html"
    done = write_report([directory], out)
    first = out.read_bytes()
    assert write_report([directory], out) == done
    assert out.read_bytes() == first == build_report([directory], out.parent).encode()
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert done["maps"] == done["beat_controls"] == 1
    assert done["bytes"] == len(first)
    assert "run/metrics.json" in done["files"]
    json.dumps(done)


def test_figures_of_some_roles_say_so(tmp_path: Path) -> None:
    roles = ["user", "assistant"]
    some = {
        "adapter.json": {**made.adapter(), "roles": roles},
        "metrics.json": {**made.metrics(), "roles": roles},
        "stitch.json": {**made.stitch(), "roles": ["assistant"]},
    }
    found = page(
        made.write(tmp_path / "some", some),
        made.write(tmp_path / "cka", {"cka.json": made.cka() | {"roles": ["user"]}}),
    )
    for words in ("same byte of the roles user, assistant", "tokens of the role assistant,", "pairs of the role user,"):
        assert words in found.text, words
    assert "of the role" not in page(run_of(tmp_path)).text
