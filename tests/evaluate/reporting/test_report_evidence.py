"""What the report concludes: warnings by cause, gains over controls, answers against rate, the answer at the top."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from align.judging.findings import finding
from align.judging.sentences import sentence
from align.judging.table import JUDGED
from evaluate.reporting import write_report
from evaluate.reporting.prose.notes import warnings
from evaluate.reporting.reading.inputs import Node, read_runs
from evaluate.reporting.sections.gains import beats_all, standing
from tests.evaluate.reporting.test_report_parts import plot_of
from tests.support import report_fixtures as made
from tests.support.drawings import drawing, drawings, marks
from tests.support.report_fixtures import page, run_of

BACK = "twin:15->smol:15"


def gain(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "ci95": [low, high], "above": low > 0}


def right(accuracy: float, size: float, pair: str | None = made.PAIR) -> dict[str, Any]:
    ends = [max(0.0, accuracy - 0.125), min(1.0, accuracy + 0.125)]
    return {"accuracy": accuracy, "ci95": ends, "bytes": size, "n": 40, "right": round(40 * accuracy), "pair": pair}


CLEAR, NONE = gain(0.5, 0.25, 0.75), gain(0.05, -0.1, 0.2)


def task(ways: dict[str, float], size: float, gains: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A task whose text has 20 bytes; files sort their keys."""
    conditions = {"silent": right(0.1, 0.0, None), "text": right(0.9, 20.0, None), "summary": right(0.6, 30.0, None)}
    for way, accuracy in ways.items():
        conditions[f"{way} {made.PAIR}"] = right(accuracy, size)
        for control, reached in (("random", 0.1), ("shuffled", 0.2)):
            name = control if way == "replace" else f"{way}_{control}"
            conditions[f"{name} {made.PAIR}"] = right(reached, size)
    entry = {"task": "countries", "n": 40, "chance": 0.05, "conditions": dict(sorted(conditions.items()))}
    beats = {way: {"beats": len(of) == 3 and all(gain["above"] for gain in of.values())} for way, of in gains.items()}
    return {"tasks": {"countries": entry | {"gains": gains, "beats": beats, "reasons": {}, "warnings": []} | more}}


def over(silent: Any, random: Any, shuffled: Any) -> dict[str, Any]:
    return {"silent": silent, "random": random, "shuffled": shuffled}


def whole(aligned: float = 0.8, gains: dict[str, Any] | None = None) -> dict[str, Any]:
    """Answers of a map that does not compress: 8000 bytes for 20 bytes of text, or one state of 1000."""
    found = {f"aligned {made.PAIR}": over(CLEAR, CLEAR, CLEAR), f"replace {made.PAIR}": over(CLEAR, NONE, CLEAR)}
    told = task({"aligned": aligned, "replace": 0.25}, 8000.0, found if gains is None else gains)
    told["tasks"]["countries"]["conditions"][f"replace {made.PAIR}"]["bytes"] = 1000.0
    return told


def windows(latents: int, accuracy: float, against: dict[str, Any] | None = None) -> dict[str, Any]:
    """A compressed run by file name, with the answers and the rate that `evaluate communicate` writes for it."""
    files, size = made.compressed(latents, 0.4 + latents / 40, 7 - latents / 8), latents * 16 * 2.0
    rate = {"windows": 40, "latents": latents, "latent_dim": 16, "latent_bytes": size, "text_bytes": 20.0}
    rate["latent_bytes_per_text_byte"] = size / 20
    why = "a map of windows gives states at its own positions only"
    told = task(
        {"aligned": accuracy},
        size,
        {f"aligned {made.PAIR}": against or over(CLEAR, CLEAR, CLEAR)},
        pairs={made.PAIR: {"map_numbers": 1, "rate": rate}},
        reasons={f"replace, sum, mean {made.PAIR}": why},
    )
    return files | {"communicate.json": told}


def warned(pairs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    result = made.metrics()
    block = result["pairs"][made.PAIR]
    result["pairs"] = {
        key: block | {"warnings": [each | {"where": {"pair": key}} for each in found]} for key, found in pairs.items()
    }
    return {"metrics.json": result}


def sink(masked: float, kept: float) -> dict[str, Any]:
    return finding("sink-dominated", masked=masked, kept=kept)


def test_a_warning_of_many_maps_is_one_line_and_none_is_dropped(tmp_path: Path) -> None:
    runs = []
    for name, shift in (("one", 0.0), ("two", 0.01)):
        pairs = {made.PAIR: [sink(0.95 - shift, 0.03)], BACK: [sink(0.94, 0.03)], "smol:30->twin:28": [sink(0.9, 0.5)]}
        runs.append(made.write(tmp_path / name, warned(pairs)))
    (note,) = warnings(read_runs(runs))
    assert note.code == "sink-dominated"
    assert str(note.text).startswith(
        "CKA is 0.900 to 0.950 with attention sinks masked and 0.030 to 0.500 with them in: "
    )
    assert note.places == "6 times; smol:15 ↔ twin:15, smol:30 → twin:28; in one, two"
    assert len(note.where) == 6
    # The two directions and runs say the same in part: a text stands once, with all its places.
    assert [(str(text)[7:12], where) for text, where in note.details] == [
        ("0.950", "one, smol:15 → twin:15"),
        ("0.940", "one, twin:15 → smol:15; two, smol:15 → twin:15; two, twin:15 → smol:15"),
        ("0.900", "one, smol:30 → twin:28; two, smol:30 → twin:28"),
    ]
    html = page(*runs).html
    assert html.count("<li><b>sink-dominated</b>") == 1
    for text in ("0.950 with", "0.940 with", "0.900 with"):
        assert text in html


def test_other_causes_and_codes_stay_apart_with_the_gravest_first(tmp_path: Path) -> None:
    best = {"r2": 0.1, "best": 0.2}
    found = [
        finding("overfit", train=0.9, test=0.2),
        # One that was measured on validation alone says something else.
        finding("overfit", train=0.9, validation=0.2),
        finding("no-better-than-controls", control="mean", **best),
        finding("no-better-than-controls", control="shuffled", **best),
        finding("after-final-norm", layer=3, model="twin"),
    ]
    notes = warnings(read_runs([made.write(tmp_path / "run", warned({made.PAIR: found}))]))
    assert [(n.code, str(n.text)) for n in notes] == [
        (found[at]["code"], str(escape(sentence(found[at])))) for at in (4, 2, 3, 0, 1)
    ]
    assert [n.where for n in notes] == [("run, smol:15 → twin:15",)] * 5
    assert [n.places for n in notes] == ["run, smol:15 → twin:15"] * 5


def test_words_of_earlier_versions_are_shown_as_they_are(tmp_path: Path) -> None:
    said = [{"code": "few-rows", "message": f"{n} pairs < 5760"} for n in (12, 30)] + [{"code": "new", "values": {}}]
    found = warnings(read_runs([made.write(tmp_path / "run", warned({made.PAIR: said}))]))
    assert [(note.code, str(note.text)) for note in found] == [
        ("few-rows", "12 pairs &lt; 5760"),
        ("few-rows", "30 pairs &lt; 5760"),
        ("new", "new"),
    ]


def test_what_is_only_worth_knowing_comes_last_and_does_not_count(tmp_path: Path) -> None:
    files = warned({made.PAIR: [finding("lambda-at-grid-start", lam=1e-6)]})
    files["stitch.json"] = made.stitch()
    files["stitch.json"]["pairs"][made.PAIR] |= {"n_documents": 3, "effective_documents": 2.5}
    directory = made.write(tmp_path / "run", files)
    assert [note.code for note in warnings(read_runs([directory]))] == ["few-documents", "lambda-at-grid-start"]
    html = page(directory).html
    assert '<li class="calm"><b>lambda-at-grid-start</b>' in html
    board = html.split('id="stitched"')[0].split('<tr class="map"')[1].split("</tr>")[0]
    assert board.endswith('<td class="num" data-sort="0">0</td>')


def test_what_was_judged_when_it_was_made_is_not_judged_again(tmp_path: Path) -> None:
    """Few documents by today's limit: a file that says it was judged is taken at its word."""
    files = {"stitch.json": made.stitch(), "cka.json": made.cka()}
    files["stitch.json"]["pairs"][made.PAIR] |= {"n_documents": 3, "effective_documents": 2.5}
    codes = []
    for name, more in (("old", {}), ("judged", {"judged": JUDGED})):
        told = {file: content | more for file, content in files.items()}
        codes.append([note.code for note in warnings(read_runs([made.write(tmp_path / name, told)]))])
    assert codes == [["sink-dominated", "few-documents", "undefined", "above-one"], []]


def test_ways_that_fall_short_alike_are_one(tmp_path: Path) -> None:
    told = whole()
    counts = {"first_alone": 3, "second_alone": 2, "p": 1.0}
    told["tasks"]["countries"]["warnings"] = [
        finding(
            "no-better-than-control",
            {"pair": made.PAIR, "way": way, "control": "random"},
            mapped=mapped,
            reached=0.1,
            **counts,
        )
        for way, mapped in (("aligned", 0.3), ("replace", 0.1))
    ]
    (note,) = warnings(read_runs([made.write(tmp_path / "run", {"communicate.json": told})]))
    assert str(note.text).startswith("10% to 30% right with mapped states, 10% with this control: not clearly better")
    assert note.where == tuple(f"run, countries, {way}, random, smol:15 → twin:15" for way in ("aligned", "replace"))


def test_a_map_without_an_interval_or_with_a_failed_self_injection_beats_nothing(tmp_path: Path) -> None:
    text = page(run_of(tmp_path, "alone", stitch=made.stitch(gain_ci=None))).text
    assert "It was not compared with every control." in text
    assert "beats every control" not in text
    broken = made.stitch()
    broken["pairs"][made.PAIR]["self_bit_identical"] = False
    text = page(run_of(tmp_path, "broken", stitch=broken)).text
    assert "self-injection fails" in text
    assert "beats every control" not in text
    hidden = made.stitch(self=made.loss(3.76))
    hidden["pairs"][made.PAIR]["self_bit_identical"] = True
    assert "beats every control" in page(run_of(tmp_path, "hidden", stitch=hidden)).text


def test_training_that_kept_its_start_says_so(tmp_path: Path) -> None:
    events = [event | ({"best_epoch": 0} if event["event"] == "stop" else {}) for event in made.log()]
    words = "Training found nothing better than its start"
    assert words in page(made.write(tmp_path / "run", made.documents(), events)).text
    assert words not in page(run_of(tmp_path, "better")).text


@pytest.mark.parametrize(
    ("block", "place"),
    [
        (gain(0.3, 0.01, 0.5), "above"),
        (gain(0.3, 0.0, 0.5), "level"),
        # Of few questions an interval leaves out zero where the exact test does not: the file has judged by both.
        (gain(0.1, 0.01, 0.2) | {"above": False}, "level"),
        ({"value": 0.3, "ci95": [0.1, 0.2]}, "unknown"),
        ({"value": None, "ci95": [0.1, 0.2]}, "unknown"),
        (None, "unknown"),
    ],
)
def test_a_gain_is_what_the_file_says_of_it(block: Any, place: str) -> None:
    assert standing(Node(block)) == place


def test_a_way_that_was_not_judged_beats_nothing() -> None:
    way = "aligned p"
    for beats in (True, False, None):
        assert beats_all(Node({"beats": {way: {"beats": beats}}}), way) is (beats is True)
    assert not beats_all(Node({"gains": {way: over(CLEAR, CLEAR, CLEAR)}}), way)


def test_among_many_ways_a_weak_one_may_be_chance(tmp_path: Path) -> None:
    way = f"aligned {made.PAIR}"
    told = whole()
    counts = {"p": 0.02, "first_alone": 9, "second_alone": 1}
    told["tasks"]["countries"]["gains"] = {way: over(*[CLEAR | counts] * 3)}
    for adjusted, beats in ((0.04, True), (0.2, False)):
        told["tasks"]["countries"]["beats"] = {way: {"p": 0.02, "p_adjusted": adjusted, "beats": beats}}
        found = page(made.write(tmp_path / str(beats), {"communicate.json": told}))
        assert ("may be chance (adjusted p 0.2)" in found.text) is not beats
        assert ("<b>3 of 3</b>" in found.html) is beats
        assert "(9:1)" in found.text


def test_gains_stand_in_a_table_that_sorts_with_marks_and_whiskers(tmp_path: Path) -> None:
    found = page(made.write(tmp_path / "run", {"communicate.json": whole()}))
    table = found.html.split('aria-label="countries, gains"')[1].split("</table>")[0]
    headings = re.findall(r"<th [^>]*>([^<]*)</th>", table)
    assert headings == ["sent", "right", "above", "over silent", "over random", "over shuffled"]
    rows = re.findall(r"<tr><td data-sort=\"(\w+)\">(.*?)</tr>", table)
    assert [name for name, _ in rows] == ["aligned", "replace"]
    sorts = [re.findall(r'class="num" data-sort="([^"]*)"', row) for _, row in rows]
    assert sorts == [["0.8", "3", "0.5", "0.5", "0.5"], ["0.25", "2", "0.5", "0.05", "0.5"]]
    assert "<b>3 of 3</b>" in rows[0][1]
    assert "2 of 3" in rows[1][1]
    signs = [re.findall(r'<span class="(above|level|below|unknown)" title="[^"]+">(.)</span>', row) for _, row in rows]
    assert signs == [[("above", "▲")] * 3, [("above", "▲"), ("level", "○"), ("above", "▲")]]
    shown = [text for attrs, text in found.figures if "/gains/replace" in attrs["data-from"]]
    assert shown == ["+50", "25", "75", "+5", "\u221210", "20", "+50", "25", "75"]
    # A whisker's ends and its line at zero lie on one scale for the whole table, from -0.1 to 0.75.
    sparks = [spec for spec in drawings(table) if spec["kind"] == "spark"]
    assert {tuple(spec["bounds"]) for spec in sparks} == {(-0.1, 0.75)}
    assert "replace smol:15 → twin:15 over random: 0.05 [\u22120.1, 0.2]" in [marks(spec)[0][0] for spec in sparks]


def test_a_missing_comparison_says_why_and_layers_show_where_there_are_several(tmp_path: Path) -> None:
    told = whole(gains={f"aligned {made.PAIR}": {"silent": CLEAR, "random": CLEAR}, f"sum {BACK}": over(*[NONE] * 3)})
    told["tasks"]["countries"]["reasons"] = {f"aligned_shuffled {made.PAIR}": "no two examples differ"}
    found = page(made.write(tmp_path / "run", {"communicate.json": told}))
    assert "no two examples differ" in found.attributes("title")
    table = found.html.split('aria-label="countries, gains"')[1].split("</table>")[0]
    assert ">layers<" in table
    assert "twin:15 → smol:15" in table
    assert "Not run: aligned shuffled, smol:15 → twin:15. no two examples differ" in found.text
    assert "above silent and random; the other controls were not run" in found.text


def test_conditions_stand_beside_their_controls(tmp_path: Path) -> None:
    html = page(made.write(tmp_path / "run", {"communicate.json": whole()})).html
    table = html.split('aria-label="countries, answers"')[1].split("</table>")[0]
    assert re.findall(r'<th scope="row"[^>]*>([^<]*)<', table) == [
        *("silent", "text", "summary", "aligned", "aligned random", "aligned shuffled"),
        *("replace", "random", "shuffled"),
    ]
    # A control is what it puts in, not what it is a control of.
    assert '<th scope="row" title="the states of another example">aligned shuffled' in table


def test_answers_are_judged_by_paired_gains(tmp_path: Path) -> None:
    text = page(made.write(tmp_path / "run", {"communicate.json": whole()})).text.replace("\u202f", " ")
    assert "On the same questions that is above the question alone, random and shuffled states, each by more" in text
    assert "Of 2 ways to send states, 1 is above all three." in text
    level = {f"aligned {made.PAIR}": over(CLEAR, NONE, CLEAR)}
    text = page(made.write(tmp_path / "level", {"communicate.json": whole(gains=level)})).text
    assert "That is not above random by more than the interval of the difference." in text
    assert "above every control" not in text


def test_answers_lie_at_their_rate_beside_text_and_states(tmp_path: Path) -> None:
    runs = [made.write(tmp_path / f"m{m}", windows(m, 0.2 + m / 40)) for m in (16, 4)]
    runs.append(run_of(tmp_path, "whole", communicate=whole()))
    found = page(*runs)
    placed = {t: (x, y) for t, x, y in plot_of(found.html, "Right answers against rate, countries, smol:15 → twin:15")}
    named = {title.split(" at ")[0]: place for title, place in placed.items()}
    assert set(named) == {
        *(f"m{m}, aligned{control}" for m in (4, 16) for control in ("", " random", " shuffled")),
        *("whole, aligned", "whole, replace"),
        *("whole, text", "whole, summary"),
    }
    assert "m4, aligned at 6.4 bytes per byte of text, countries: 0.3 [0.175, 0.425]" in placed
    assert "whole, aligned at 400 bytes per byte of text, countries: 0.8 [0.675, 0.925]" in placed
    (text,) = [place for title, place in named.items() if title.endswith(", text")]
    # The axis is logarithmic: 1, 6.4, 25.6 and 400.
    step = (named["m16, aligned"][0] - named["m4, aligned"][0]) / 2
    assert (named["m4, aligned"][0] - text[0]) / step == pytest.approx(2.678, abs=0.01)
    assert (named["whole, aligned"][0] - text[0]) / step == pytest.approx(8.644, abs=0.01)
    slope = (named["m16, aligned"][1] - named["m4, aligned"][1]) / 0.3
    assert named["whole, aligned"][1] - text[1] == pytest.approx(-0.1 * slope, abs=0.05)
    plot = drawing(found.html, "Right answers against rate, countries, smol:15 → twin:15")
    assert [name for _, name in plot["references"]] == ["the question alone", "guessing"]
    # Compressed maps are a course; other maps and the text are points, with a gap after each.
    joined = [name for name, _, line in plot["series"] if not any(value is None for _, value, *_ in line)]
    assert len(joined) == 3
    kept = [title for title, _, _ in plot_of(found.html, "Held-out R² against rate, smol:15 → twin:15")]
    assert "whole, states as they are, at the rate of its answers: 0.861 [0.841, 0.881]" in kept
    recovered = [title for title, _, _ in plot_of(found.html, "Recovered share against rate, smol:15 → twin:15")]
    assert "m4, from the mean state, 4×16: 0.6 [0.8213, 0.8822]" in recovered
    # From the token alone: 0.9041 of 4.79 + 0.9041 - 3.7.
    assert "whole, states as they are, at the rate of its answers: 0.453387 [0.403387, 0.503387]" in recovered


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    text = page(made.write(tmp_path / "m4", windows(4, 0.3, over(NONE, CLEAR, NONE)))).text
    assert "Not run: replace, sum, mean, smol:15 → twin:15. a map of windows gives states" in text
    assert "That is not above silent or shuffled by more than the interval" in text


def test_the_table_of_rates_has_answers_and_links_each_to_its_file(tmp_path: Path) -> None:
    runs = [made.write(tmp_path / "m4", windows(4, 0.3)), run_of(tmp_path, "whole", communicate=whole())]
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    table = html.split('aria-label="Rates, smol:15 → twin:15"')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr><td.*?</tr>", table)]
    assert [re.sub("<[^>]*>", "", row[1]) for row in rows] == [
        *("4×16", "states as they are", "the text itself", "a summary in words")
    ]
    answers = [re.sub("<[^>]*>", "", row[-1]).replace("\u202f", " ") for row in rows]
    assert answers == ["30 % [18, 42] at 6.400", "80 % [68, 92]", "90 % [78, 100]", "60 % [48, 72]"]
    rates = [re.sub("<[^>]*>", "", row[3]) for row in rows]
    assert rates == ["0.250", "400.0", "1.000", "1.500"]
    links = re.findall(r'href="([^"]+)"', rows[0][-1])
    assert set(links) == {"./m4/communicate.json"}
    assert set(re.findall(r'href="([^"]+)"', rows[1][-1])) == {"./whole/communicate.json"}
    assert "at a higher rate than R² and losses of the same run" in html
    assert "8000 bytes for 20 bytes of text" in rows[1][3]


def test_uncompressed_maps_alone_have_no_rates(tmp_path: Path) -> None:
    assert 'id="rates"' not in page(run_of(tmp_path, communicate=whole())).html
    silent = made.write(tmp_path / "m4", made.compressed(4))
    html = page(silent, run_of(tmp_path, "mute", communicate=None)).html
    assert "Right answers against rate" not in html
    assert "states as they are" not in html.split('id="rates"')[1].split('id="cka"')[0]


def lede(*dirs: Path) -> str:
    html = page(*dirs).html.split("<nav")[0].split('class="lede">')[1]
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", "", html)).replace("\u202f", " ")


def test_the_answer_at_the_top_gives_evidence_and_caution(tmp_path: Path) -> None:
    text = lede(run_of(tmp_path, communicate=whole()))
    for words in (
        "Procrustes at smol:15 → twin:15 beats every control: it lowers the loss by 0.90 nats/token [0.70, 1.11] from",
        "45 % [40, 50] of the way to the clean run, on 24 test documents.",
        "on 24 test documents.",
        "On held-out text Procrustes at smol:15 → twin:15 predicts the target’s states with R² 0.861",
        "explains 0.749 [0.701, 0.792] of the error that the source’s token alone leaves (partial R²), above every",
        "Asked what only the source has read (countries), the target answers 80 % [68, 92] of 40 questions right",
        "90 % from the text itself, 10 % from the question alone.",
        "Of the 2 ways to send states that were tried, 1 is above the question alone, random and shuffled states",
        "Before relying on this, read the warnings: ",
    ):
        assert words in text, words


def test_the_answer_at_the_top_claims_no_more_than_its_numbers(tmp_path: Path) -> None:
    poor = run_of(
        tmp_path,
        "poor",
        metrics=made.metrics(-0.2, -0.2),
        communicate=windows(4, 0.3, over(NONE, NONE, NONE))["communicate.json"],
    )
    text = lede(poor)
    assert "which does not beat the mean state (0.000)" in text
    assert "It is not above the question alone, random and shuffled states beyond the interval." in text
    many = {f"aligned {made.PAIR}": over(CLEAR, CLEAR, CLEAR)}
    many |= {f"sum smol:{k}->twin:{k}": over(NONE, NONE, NONE) for k in range(5)}
    text = lede(run_of(tmp_path, "many", communicate=whole(gains=many)))
    assert "Of the 6 ways to send states that were tried, 1 is above" in text
    # What is above its controls is named, though something else was right more often.
    better = copy.deepcopy(windows(4, 0.95, over(CLEAR, NONE, CLEAR)))
    text = lede(made.write(tmp_path / "m4", better), run_of(tmp_path, "sure", communicate=whole()))
    assert (
        "answers 80 % [68, 92] of 40 questions right from mapped states (aligned at smol:15 → twin:15 of sure)" in text
    )
    quiet = warned({made.PAIR: []})
    assert "No file carries a warning." in lede(made.write(tmp_path / "quiet", quiet))


def test_a_model_mapped_to_itself_is_the_ceiling_and_not_the_answer(tmp_path: Path) -> None:
    own = "smol:15->smol:15"

    def renamed(block: dict[str, Any]) -> dict[str, Any]:
        return {"pairs": {own: block["pairs"][made.PAIR]}}

    stitched = made.stitch(mapped=3.71, recovered=0.999, gain=2.5, gain_ci=(2.25, 2.75))
    ceiling = made.write(
        tmp_path / "self", {"metrics.json": renamed(made.metrics(0.9999, 0.9999)), "stitch.json": renamed(stitched)}
    )
    told = whole()
    other = copy.deepcopy(told["tasks"]["countries"])
    # The model that read it answers best of all, which is no surprise.
    other["conditions"][f"aligned {made.PAIR}"] = right(0.95, 8000.0)
    told["tasks"]["countries"] |= {"source": "smol", "target": "twin"}
    told["tasks"]["countries (twin->twin)"] = other | {"source": "twin", "target": "twin"}
    text = lede(run_of(tmp_path, communicate=told), ceiling)
    assert "Procrustes at smol:15 → twin:15 beats every control: it lowers the loss by 0.90" in text
    assert "The ceiling, a model mapped to itself, recovers 99.9 %" in text
    assert "predicts the target’s states with R² 0.861" in text
    assert "answers 80 % [68, 92] of 40 questions right" in text
    assert "Of the 2 ways to send states" in text
    html = page(run_of(tmp_path, communicate=told), ceiling).html
    assert "<title>smol → twin" in html
    cards = html.split('class="verdicts"')[1]
    assert cards.index("smol:15 → twin:15") < cards.index("smol:15 → smol:15")
    # Alone it is what there is.
    assert "smol:15 → smol:15 beats every control: it lowers the loss by 2.50" in lede(ceiling)
    assert "The ceiling" not in lede(ceiling)


def test_the_map_that_is_quoted_is_chosen_by_validation_and_not_by_test(tmp_path: Path) -> None:
    def made_of(val: float, test: float, beyond: float) -> dict[str, Any]:
        scored = made.metrics(test)
        scored["pairs"][made.PAIR]["val"] = made.block(val)
        return {
            "metrics.json": scored,
            "stitch.json": made.stitch(mapped=5.69 - beyond, gain=beyond, gain_ci=(beyond - 0.2, beyond + 0.2)),
        }

    lucky = made.write(tmp_path / "lucky", made_of(0.70, 0.88, 1.5))
    chosen = made.write(tmp_path / "chosen", made_of(0.80, 0.86, 0.9))
    for order in ((lucky, chosen), (chosen, lucky)):
        text = lede(*order)
        assert "2 of 2 injected maps beat every control. The one with the highest validation R²," in text
        assert "lowers the loss by 0.90 nats/token [0.70, 1.10]" in text
        assert "(validation ranks it first) with R² 0.860" in text
        # Neither figure of the map that test happens to favour.
        assert "1.50" not in text
        assert "R² 0.880" not in text
        html = page(*order).html
        rows = re.findall(r'<tr class="map"[^>]*><td class="name" data-sort="(\w+)">', html)
        assert rows == ["chosen", "lucky"]
    # One that validation prefers and no control supports is quoted all the same.
    poor = made.write(tmp_path / "poor", made_of(0.9, 0.5, -0.3))
    text = lede(lucky, poor)
    assert "1 of 2 injected maps beats every control. The one with the highest validation R²," in text
    assert "adds nothing to the source’s token alone (−0.30 nats/token [−0.50, −0.10])" in text
    assert "and is not among them." in text
