"""The page and the pictures about similarity: true to the numbers, safe against names, usable by eye, key and touch."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.pages.document import DRAWN
from align.pages.palette import ALIKE, BELOW, Scale, colour, is_dark
from align.similarity import heatmaps
from align.similarity.findings import judged
from align.similarity.page import render, words, write
from align.similarity.page.definitions import MEASURES
from align.similarity.page.views import best, views
from tests.support.browser import Browser, Tab, browser
from tests.support.report_fixtures import Page
from tests.support.similarity_fixture import TITLES, similarity_result

__all__ = ["browser"]

HOSTILE = "</script><script>window.ran=1</script><b>$x_"
CELL = "svg[data-block='{block}'][data-panel='{panel}'] [data-i='{i}'][data-j='{j}']"


def bare() -> dict[str, Any]:
    """What `align cka` wrote before there were other measures, from a store without rows."""
    layers, hole = {"a": [0, 3], "b": [0]}, [[None], [None]]
    return {
        "models": ["a", "b"],
        "layers": layers,
        "estimator": "debiased",
        "kernel": "linear",
        "n": 500,
        "cross": [[0.5], [None]],
        "within": {"a": [[1.0, None], [None, None]], "b": [[1.0]]},
        "reasons": {"a:3 b:0": "it does not vary"},
        "null": {"cross": hole, "n": 0, "method": "shuffled pairs", "estimator": "debiased", "reason": "no rows"},
        "masked_rows": 3,
        "keep_sinks": False,
        "unmasked": {"n": 503, "cross": hole, "within": {"a": [[None, None]] * 2, "b": [[None]]}, "reasons": {}},
        "store": {"path": "x.zarr", "fingerprint": "1"},
    }


CASES: dict[str, dict[str, Any]] = {
    "five": similarity_result(),
    "deep": similarity_result(33, 33, measures=("rbf-cka",)),
    "kept": similarity_result(3, 2, keep_sinks=True, measures=()),
    "alone": similarity_result(models=("solo", "solo"), nulls=False, measures=("cka", "pwcca")),
    "hostile": similarity_result(2, 2, models=(HOSTILE, "a & 'b'\u2028"), measures=("rsa", "ridge-r2")),
    "bare": bare(),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    return {name: root / name / write(result, root / name) for name, result in CASES.items()}


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as tab:
        tab.size(1200, 900)
        tab.media()
        yield tab


def table_of(tab: Tab, selector: str) -> list[list[str]]:
    return tab.run(
        f"[...document.querySelectorAll({json.dumps(selector)} + ' tr')].map(r => [...r.cells].map(c => c.innerText))"
    )


# The file


def test_the_page_needs_nothing_but_itself() -> None:
    html = render(CASES["five"])
    found = Page(html)
    ids = found.attributes("id")
    assert len(ids) == len(set(ids))
    for name in ("src", "srcset", "href", "action", "data", "background"):
        # No icon is asked for.
        assert all(value.startswith("#") or value == "data:," for value in found.attributes(name))
    targets = {value[1:] for value in found.attributes("href") if value.startswith("#")}
    assert targets <= set(ids)
    # Names of XML name spaces, which nobody fetches.
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|//cdn", html)
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on") or name == "style"]
    (policy,) = [c for c in found.attributes("content") if "script-src" in c]
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    for part, text, more in (("script", found.scripts[-1], ""), ("style", style[1], f" '{DRAWN}'")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{part}-src 'sha256-{digest}'{more};" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(CASES["five"], tmp_path / "new") == "cka.html"
    assert (tmp_path / "new" / "cka.html").read_text() == render(copy.deepcopy(CASES["five"]))


def test_nan_is_read_as_null() -> None:
    blank = copy.deepcopy(CASES["five"])
    blank["cross"] = np.array([[math.nan if v is None else v for v in row] for row in blank["cross"]])
    assert render(blank) == render(CASES["five"])


def test_names_cannot_leave_their_place() -> None:
    found = Page(render(CASES["hostile"]))
    assert len(found.scripts) == 1
    [block] = found.data_blocks
    data = json.loads(block)
    assert data["models"] == [HOSTILE, "a & 'b'\u2028"]
    assert not re.search(r"[<>&\u2028]", block)
    assert HOSTILE in found.text


# Views


def test_views_hold_the_numbers_where_they_belong() -> None:
    result = CASES["five"]
    shown = {view["id"]: view for view in views(result)}
    assert list(shown) == ["all-rows", *TITLES]
    main = {block["key"]: block for block in shown["all-rows"]["blocks"]}
    assert list(main) == ["cross", "within:smol", "within:twin"]
    assert main["cross"]["values"] == result["cross"]
    assert main["cross"]["beside"]["values"] == result["unmasked"]["cross"]
    assert main["cross"]["beside"]["n"] == 98040
    assert main["within:twin"]["values"] == result["within"]["twin"]
    assert main["within:twin"]["beside"]["values"] == result["unmasked"]["within"]["twin"]
    exchanged = result["permutations"]["documents"]
    assert main["cross"]["floors"][0] == {
        "name": "documents exchanged",
        "values": exchanged["mean"],
        "edge": exchanged["p95"],
        "p": exchanged["p_max"],
        "excess": None,
        "n": 8000,
    }
    assert [floor["name"] for floor in main["cross"]["floors"]] == ["documents exchanged", "same token elsewhere"]
    assert main["within:twin"]["floors"] == []
    without = views({**result, "permutations": {}})[0]["blocks"][0]
    assert without["floors"] == [{"name": "rows shuffled", "values": result["null"]["cross"], "n": 4096}]
    for name, given in result["measures"].items():
        blocks = {block["key"]: block for block in shown[name]["blocks"]}
        assert blocks["cross"]["values"] == given["cross"]
        assert blocks["cross"]["ci"] == given["ci95"]["cross"]
        assert blocks["within:smol"]["ci"] == given["ci95"]["within"]["smol"]
        assert [f["values"] for f in blocks["cross"]["floors"]] == [
            *(floor["mean"] for floor in given["permutations"].values()),
            given["floors"]["noise"]["cross"],
        ]
        assert ("reverse" in blocks) == (name in ("pwcca", "ridge-r2"))
        if "reverse" in blocks:
            assert blocks["reverse"]["values"] == given["reverse"]
            assert blocks["reverse"]["ci"] is None
            assert (blocks["cross"]["title"], blocks["reverse"]["title"]) == ("smol → twin", "twin → smol")
        rounding, halves, twice = blocks["cross"]["ceilings"]
        assert rounding["columns"] == given["ceilings"]["rounding"]["twin"]
        assert halves["values"] == given["ceilings"]["halves"]["cross"]
        assert twice["reason"] == "the model was not loaded"


def test_a_reason_is_found_in_either_order() -> None:
    result = bare()
    result["reasons"]["b:0 a:0"] = "turned"
    result["reasons"]["a:0 a:3"] = "inside"
    cross, within, _ = views(result)[0]["blocks"]
    assert cross["reasons"] == {"0,0": "turned", "1,0": "it does not vary"}
    assert within["reasons"] == {"0,1": "inside", "1,0": "inside"}
    assert cross["beside"] is None


def test_what_lies_beside_follows_the_sinks() -> None:
    for name, states in (("five", ("masked", "left in")), ("kept", ("left in", "masked"))):
        block = views(CASES[name])[0]["blocks"][0]
        assert (block["state"], block["beside"]["state"]) == tuple(f"attention sinks {state}" for state in states)
    block = views(CASES["kept"])[0]["blocks"][0]
    assert block["beside"]["values"] == CASES["kept"]["masked"]["cross"]


def test_one_model_alone_is_compared_with_its_other_layers() -> None:
    result = CASES["alone"]
    main = views(result)[0]
    assert [block["key"] for block in main["blocks"]] == ["cross"]
    i, j = words.most_alike(main) or (0, 0)
    assert i != j
    values = np.array(result["cross"])
    np.fill_diagonal(values, -1)
    assert values[i, j] == values.max()
    # Every pair once, no layer with itself.
    first, floor, *_ = words.summary(result, views(result))
    upper = values[np.triu_indices(5, 1)]
    assert f"the median over all pairs of layers is {np.median(upper):.3f}." in first
    assert "10 of 10 pairs of layers are above that floor" in floor


def test_the_best_of_equals_is_the_first() -> None:
    assert best([None, 2.0, 3.0, 3.0], "higher") == 2
    assert best([None, 2.0, 1.0, 1.0], "lower") == 2
    assert best([9.0, 2.0], "higher", 0) == 1
    assert best([None, None], "higher") is None


# Colours


def lab(rgb: tuple[int, int, int]) -> np.ndarray:
    c = np.array(rgb) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    f = np.cbrt(xyz @ c / np.array([0.95047, 1, 1.08883]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_equal_steps_of_similarity_look_equal() -> None:
    points = np.array([lab(colour(k / 16)) for k in range(17)])
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert steps.max() / steps.min() < 1.6
    assert (np.diff(points[:, 0]) < 0).all()
    below = np.array([lab(colour(-k / 16))[0] for k in range(17)])
    assert (np.diff(below) < 0).all()
    assert colour(0.0) == ALIKE[0][1] == BELOW[0][1]


def test_a_scale_holds_every_value_and_turns_for_distances() -> None:
    scale = Scale.over([0.2, None, 1.3, -0.1])
    assert (scale.low, scale.high) == (-0.1, 1.3)
    assert scale.share(1.3) == 1
    assert scale.share(-0.1) == pytest.approx(-0.1 / 1.3)
    assert Scale.over([-50.0, 0.5]).share(-50.0) == -1
    far = Scale.over([0.3, 0.9], closer="lower", bounds=(0, None))
    assert (far.low, far.high, far.share(0.9), far.share(0.0)) == (0, 0.9, 0, 1)
    assert Scale.over([], closer="lower", bounds=(0, None)).high == 1
    assert Scale.over([0.0], closer="lower", bounds=(0, None)).share(0.0) == 1


def test_lettering_has_the_better_contrast() -> None:
    for k in range(-20, 21):
        rgb = colour(k / 20)
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
        white, black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05
        assert (white if is_dark(rgb) else black) >= 4.5


# Words


def test_the_summary_says_what_the_numbers_say() -> None:
    result = bare()
    result |= {"cross": [[0.81], [0.4]], "reasons": {}}
    result["permutations"] = {
        "documents": {
            "mean": [[0.01], [0.5]],
            "p95": [[0.02], [0.6]],
            "p_max": [[0.025], [0.3]],
            "rows": 400,
            "documents": 9,
            "draws": 39,
        },
        "token": {"reason": "hardly any token"},
    }
    result["unmasked"]["cross"] = [[0.8], [0.99]]
    result["within"]["a"] = [[1.0, 0.1], [0.1, 1.0]]
    shown = views(result)
    first, floor, sinks = words.summary(result, shown)
    assert first == (
        "a 0 × b 0 are the most alike, with debiased linear CKA 0.810 over 500 paired rows; the median over all pairs "
        "of layers is 0.605."
    )
    assert floor == (
        "With documents in each other's place at equal positions, 400 rows of 9 documents give 0.010 to 0.500 on "
        "average (95\u202f% below 0.600): 1 of 2 pairs of layers are above that floor (p \u2264 0.05, corrected for "
        "all of them). There is no floor with partners of the same token in another document: hardly any token."
    )
    assert sinks == (
        "3 rows are attention sinks and left out. With them in, linear CKA changes by up to 0.590 "
        "(a 3 × b 0: from 0.400 to 0.990)."
    )
    (sinks_dominate,) = said(result)
    assert sinks_dominate.startswith("a:3 b:0: CKA is 0.400 with attention sinks masked and 0.990 with them in")


def test_the_summary_of_little_says_what_is_missing() -> None:
    result = bare()
    first, floor, sinks = words.summary(result, views(result))
    assert first == "a 0 × b 0: debiased linear CKA 0.500 over 500 paired rows."
    assert floor == "There is no floor beside these figures: none was asked for."
    assert views(result)[0]["blocks"][0]["floors"] == []
    assert sinks.endswith("what they change was not computed.")
    assert said(result) == ["4 of 7 values are undefined: it does not vary"]
    result["cross"] = [[None], [None]]
    assert words.summary(result, views(result))[0] == "No two layers could be compared: it does not vary."


def said(result: dict[str, Any]) -> list[str]:
    """What the page says against a result: a file of an earlier version is judged when it is drawn."""
    return words.warnings(judged(result)["warnings"])


def test_warnings_name_what_a_careful_reader_would() -> None:
    result = similarity_result(2, 2, nulls=False, keep_sinks=True, measures=("rsa",))
    result |= {"n": 9599, "estimator": "biased"}
    result["sample"]["documents"] = 5
    result["measures"]["rsa"]["cross"][0][0] = 1.2
    found = "\n".join(said(result))
    for part in ("9,599 pairs for width 960: under 10", "biased estimator", "sinks are included", "5 documents: "):
        assert part in found
    assert "RSA: 1 of 12 values are above 1" in found
    calm = similarity_result(2, 2, nulls=False, measures=("rsa",))
    assert [found["code"] for found in judged(calm | {"n": 9600})["warnings"]] == ["sink-dominated"]


def test_measures_that_fail_alike_share_a_warning() -> None:
    found = said(CASES["five"])
    # Of the sinks, of linear CKA over all rows, and of two kinds of reasons among six measures.
    assert len(found) == 4
    assert "RBF CKA; RSA" in "".join(found)


def test_every_measure_has_its_line() -> None:
    lines = words.glances(views(CASES["five"]))
    by_title = {line.title: line for line in lines}
    given = CASES["five"]["measures"]["angular-distance"]
    values = np.array([[9.0 if v is None else v for v in row] for row in given["cross"]])
    i, j = np.unravel_index(values.argmin(), values.shape)
    line = by_title["Angular distance"]
    assert line.pair == f"smol {7 * i} × twin {7 * j}"
    assert line.value == f"{values[i, j]:.3f}"
    assert line.interval == "[{:.3f}, {:.3f}]".format(*given["ci95"]["cross"][i][j])
    floor = [v for row in given["permutations"]["documents"]["mean"] for v in row if v is not None]
    assert line.floor == f"{np.median(floor):.3f} (documents exchanged)"
    assert line.agrees == "5 of 5"
    assert set(TITLES) <= set(MEASURES)


NUMBERS = [0.0, -0.0, 1.0, 0.99995, 0.9999999999, -0.0000000001, 0.00004, -0.1234, 12.5, 1e-5, -1.0, 1.0004, None]


WRITTEN = [
    "0.000",
    "0.000",
    "1.000",
    "0.99995",
    "1.000",
    "0.000",
    "0.00004",
    "−0.123",
    "12.500",
    "0.00001",
    "−1.000",
    "1.0004",
    "–",
]


def test_a_number_never_claims_more_than_it_is() -> None:
    assert [words.number(v) for v in NUMBERS] == WRITTEN


# Pictures


def test_pictures_show_the_numbers(tmp_path: Path) -> None:
    result = CASES["five"]
    main, *others = views(result)
    figure = heatmaps._cka(main)
    maps = [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]
    assert len(maps) == 6
    wanted = [result["cross"], *result["within"].values()]
    wanted += [result["unmasked"]["cross"], *result["unmasked"]["within"].values()]
    for axes, table in zip(maps, wanted, strict=True):
        assert axes.images[0].origin == "lower"
        drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_array_equal(drawn, np.array(table, dtype=float))
        assert axes.images[0].get_clim() == (main["scale"]["low"], main["scale"]["high"])
        assert len(axes.texts) == np.isfinite(drawn).sum()
    frames = [patch.get_xy() for patch in maps[0].patches[1:] if hasattr(patch, "get_xy")]
    assert [(round(x + 0.44), round(y + 0.44)) for x, y in frames] == [(k, k) for k in range(5)]
    assert "0 to 1.01, darker is more alike" in figure.get_suptitle()
    pictures = heatmaps._measures(others)
    titles = [axes.get_title() for axes in pictures.axes if axes.get_title()]
    assert len(titles) == len(TITLES) + 2
    assert "floor, documents exchanged: 1." in next(t for t in titles if t.startswith("Angular"))
    assert any("darker is more alike (lower values)" in title for title in titles)


def test_pictures_are_the_same_from_run_to_run(tmp_path: Path) -> None:
    result = similarity_result(2, 2, models=(HOSTILE, "\\frac$"), measures=("rsa",))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        drawn = heatmaps.plot(result, tmp_path / name)
    assert drawn == ["cka.png", "cka.svg", "measures.png", "measures.svg"]
    for name in drawn:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_pictures_of_little(tmp_path: Path) -> None:
    assert heatmaps.plot(CASES["bare"], tmp_path) == ["cka.png", "cka.svg"]
    assert len([a for a in heatmaps._cka(views(CASES["bare"])[0]).axes if a.images]) == 3
    nothing = bare()
    nothing |= {"cross": [[None], [None]], "within": {"a": [[None] * 2] * 2, "b": [[None]]}}
    figure = heatmaps._cka(views(nothing)[0])
    figure.draw_without_rendering()
    assert not any(axes.get_label() == "<colorbar>" for axes in figure.axes)


# In a browser


@pytest.mark.parametrize("name", CASES)
def test_a_page_loads_silently_and_fits_a_phone(tab: Tab, pages: dict[str, Path], name: str) -> None:
    tab.size(390, 844, phone=True)
    tab.open(pages[name])
    for view in views(CASES[name]):
        tab.choose("#measure", view["id"])
        assert tab.overflow() <= 0, view["id"]
    assert tab.complaints == []
    assert tab.requests == [pages[name].resolve().as_uri()]
    assert tab.run("typeof window.ran") == "undefined"
    tab.tap(CELL.format(block="cross", panel="main", i=0, j=0))
    box = tab.run("(({left, right, top, bottom}) => [left, top, right, bottom])(READOUT.getBoundingClientRect())")
    assert 0 <= box[0] < box[2] <= 390
    assert 0 <= box[1] < box[3] <= 844


def test_the_pages_network_is_closed(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    assert tab.run("fetch('data:,x').then(() => 'open', () => 'closed')") == "closed"
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))")
    assert tab.run("typeof window.ran") == "undefined"


def test_the_selector_switches_the_measure(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    result = CASES["five"]
    assert len(tab.run("[...document.querySelectorAll('#heats svg')].map(s => s.dataset.panel)")) == 6
    for view in views(result):
        tab.choose("#measure", view["id"])
        assert tab.text("#about").startswith(view["title"])
        for block in view["blocks"]:
            for panel, values in (("main", block["values"]), ("beside", (block["beside"] or {}).get("values"))):
                grid = f"svg[data-block='{block['key']}'][data-panel='{panel}']"
                labels = tab.run(f'[...document.querySelectorAll("{grid} [data-i]")].map(c => c.ariaLabel)')
                wanted = [words.number(v) for row in values or [] for v in row]
                assert len(labels) == len(wanted)
                for text, value in zip(labels, wanted, strict=True):
                    assert f": {view['title']} {value}" in text
        cells = table_of(tab, "#table")[1:]
        assert [row[2] for row in cells] == [words.number(v) for row in view["blocks"][0]["values"] for v in row]


def test_pointing_focusing_and_tapping_show_the_numbers_of_a_cell(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    given = CASES["five"]["measures"]["rbf-cka"]
    tab.choose("#measure", "rbf-cka")
    assert tab.run("READOUT.hidden")
    tab.point(CELL.format(block="cross", panel="main", i=0, j=1))
    pointed = tab.text("#readout").replace("\n", " ")
    low, high = given["ci95"]["cross"][0][1]
    for part in (
        "smol 0 × twin 7, attention sinks masked",
        f"RBF CKA {given['cross'][0][1]:.3f}",
        f"95 % interval [{low:.3f}, {high:.3f}]",
        f"floor: documents exchanged {words.number(given['permutations']['documents']['mean'][0][1])}, 5 % beyond ",
        f" {words.number(given['permutations']['documents']['p95'][0][1])}, p = 0.025",
        f"floor: noise of the same covariance {words.number(given['floors']['noise']['cross'][0][1])}",
        "smol 0, rounded as stored 0.9999",
        "twin 7, rounded as stored 0.9998",
        f"halves differ by {words.number(given['ceilings']['halves']['cross'][0][1])}",
        "computed twice – (the model was not loaded)",
        "sigma of smol 0 12.35",
        "tied_rows 17",
        "rows 16,384",
    ):
        assert part in pointed, pointed
    tab.point("h1")
    assert tab.run("READOUT.hidden")
    tab.run(f'document.querySelector("{CELL.format(block="cross", panel="main", i=0, j=0)}").focus()')
    tab.press("ArrowRight")
    assert tab.text("#readout").replace("\n", " ") == pointed
    tab.press("End")
    assert "Undefined: self-HSIC of twin:28 is not positive" in tab.text("#readout")
    tab.press("Escape")
    assert tab.run("READOUT.hidden")
    # Not every browser gives the focus to a cell that is tapped; the page does.
    click = "dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    tab.run(f'document.querySelector("{CELL.format(block="cross", panel="main", i=0, j=1)}").{click}')
    assert tab.text("#readout").replace("\n", " ") == pointed
    tab.size(390, 844, phone=True)
    tab.tap(CELL.format(block="cross", panel="main", i=0, j=1))
    assert tab.text("#readout").replace("\n", " ") == pointed


def test_sinks_stand_beside_each_other(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    result = CASES["five"]
    tab.point(CELL.format(block="cross", panel="beside", i=3, j=0))
    text = tab.text("#readout").replace("\n", " ")
    assert "attention sinks left in" in text.partition(" Linear")[0]
    assert f"all rows {result['unmasked']['cross'][3][0]:.3f}" in text
    assert f"attention sinks masked {result['cross'][3][0]:.3f}" in text
    assert "rows 98,040" in text
    main, other = (
        tab.run(f"document.querySelector(\"svg[data-panel='{p}']\").getBoundingClientRect().top")
        for p in ("main", "beside")
    )
    assert main == other


def test_arrow_keys_walk_the_map(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    tab.run("document.querySelector('#colours').focus()")
    tab.press("Tab")
    place = "[document.activeElement.dataset.i, document.activeElement.dataset.j].join()"
    walk = [("ArrowDown", "0,0"), ("ArrowUp", "1,0"), ("ArrowRight", "1,1"), ("PageUp", "4,1"), ("End", "4,4")]
    walk += [("ArrowUp", "4,4"), ("Home", "4,0"), ("PageDown", "0,0")]
    assert tab.run(place) == "0,0"
    for key, there in walk:
        tab.press(key)
        assert tab.run(place) == there
    # One stop of the Tab key a map.
    assert tab.run(
        "[...document.querySelectorAll('svg.heat')].every(s => s.querySelectorAll('[tabindex=\"0\"]').length === 1)"
    )


def test_best_partners_are_marked_and_listed(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["hostile"])
    result = CASES["hostile"]
    tab.choose("#measure", "ridge-r2")
    for side, key in (("rows", "cross"), ("columns", "reverse")):
        table = np.array([[-9 if v is None else v for v in row] for row in result["measures"]["ridge-r2"][key]])
        if side == "columns":
            table = table.T
        rows = table_of(tab, f"#partner-tables figure:nth-child({1 if side == 'rows' else 2})")[1:]
        for found, values in zip(rows, table, strict=True):
            if values.max() == -9:
                assert found[1:3] == ["–", "–"]
            else:
                assert found[1:3] == [str(7 * values.argmax()), words.number(float(values.max()))]
    assert tab.run("document.querySelectorAll(\"svg[data-block='cross'] .best > *\").length") == 2
    tab.open(pages["five"])
    cells = "svg[data-block='cross'][data-panel='main'] .cell"
    labels = tab.run(f'[...document.querySelectorAll("{cells}")].map(c => c.ariaLabel)')
    marks = [label.partition(":")[0] for label in labels if "best partner of smol" in label]
    assert marks == [f"smol {7 * k} × twin {7 * k}" for k in range(5)]
    assert tab.run("document.querySelectorAll(\"svg[data-block^='within'] :is(.best, .partner) > *\").length") == 0


def test_the_table_sorts_and_keeps_what_is_missing_last(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    values = [v for row in CASES["five"]["cross"] for v in row if v is not None]
    for direction, order in (("descending", sorted(values, reverse=True)), ("ascending", sorted(values))):
        tab.click("#table th:nth-child(3) button")
        column = [row[2] for row in table_of(tab, "#table")[1:]]
        assert column == [words.number(v) for v in order] + ["–", "–"]
        assert tab.run("[...document.querySelectorAll('#table th[scope=col]')].map(h => h.ariaSort)")[2] == direction
    tab.click("#table th:nth-child(2) button")
    assert [row[1] for row in table_of(tab, "#table")[1:]] == sorted((str(7 * (k % 5)) for k in range(25)), key=int)
    assert (
        tab.run("document.querySelectorAll('#table th[aria-sort=none]').length") == len(table_of(tab, "#table")[0]) - 1
    )
    tab.choose("#block", "within:twin")
    assert table_of(tab, "#table")[1][2] == "1.000"
    assert "self-HSIC" not in tab.text("#table")


def test_lines_follow_the_numbers(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    result = CASES["five"]
    lines = """(where) => { const found = {}; document.querySelectorAll(where + " [data-series]").forEach(
      (p) => (found[p.dataset.series] ??= []).push(p.ariaLabel)); return found; }"""
    found = tab.run(f"({lines})('#profile')")
    floors = ["floor: documents exchanged", "floor: same token elsewhere"]
    assert list(found) == ["at the nearest depth", "best partner", *floors, "attention sinks left in"]
    for name, table in (
        ("at the nearest depth", result["cross"]),
        ("attention sinks left in", result["unmasked"]["cross"]),
    ):
        assert found[name] == [f"smol {7 * k} × twin {7 * k}: {words.number(table[k][k])}" for k in range(5)]
    ranks = tab.run(f"({lines})('#ranks')")
    for model in ("smol", "twin"):
        for key, title in (("entropy", "entropy"), ("participation", "participation ratio")):
            wanted = [f"{model} {k}: {words.number(v[key], 1)}" for k, v in result["effective_rank"][model].items()]
            assert ranks[f"{model}, {title}"] == wanted
    # A line is told by more than its colour.
    paths = "[...document.querySelectorAll('#profile .drawn .course')]"
    dashes = tab.run(f"{paths}.map(p => p.getAttribute('stroke-dasharray'))")
    assert len(set(dashes)) == len(dashes) == 5


def test_numbers_stand_in_the_cells_of_small_maps_only(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    shown = tab.run(
        "[...document.querySelectorAll(\"svg[data-block='cross'][data-panel='main'] .in > *\")].map(t => t.textContent)"
    )
    assert sorted(shown) == sorted(f"{v:.2f}" for row in CASES["five"]["cross"] for v in row if v is not None)
    tab.open(pages["deep"])
    assert tab.run("document.querySelectorAll('.in > *').length") == 0


def test_colours_may_start_at_the_floor(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    result = CASES["five"]
    tab.choose("#measure", "angular-distance")
    given = result["measures"]["angular-distance"]
    fill = f"document.querySelector(\"{CELL.format(block='cross', panel='main', i=0, j=1)}\").getAttribute('fill')"
    value, floor = given["cross"][0][1], given["permutations"]["documents"]["mean"][0][1]
    assert tab.run(fill) == "#{:02x}{:02x}{:02x}".format(*colour(1 - value / (math.pi / 2)))
    tab.choose("#colours", "floor")
    assert tab.run(fill) == "#{:02x}{:02x}{:02x}".format(*colour(1 - value / floor))
    assert "share of the way from the floor" in tab.text("#legend")
    assert "No floor was computed here" in tab.text("#heats")
    tab.open(pages["kept"])
    assert tab.run("[...document.querySelector('#colours').options].map(o => o.disabled)") == [False, False]


def test_the_script_counts_as_the_library_does(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["five"])
    assert tab.run(f"{json.dumps(NUMBERS)}.map(v => number(v))") == [words.number(v) for v in NUMBERS]
    shares = [k / 25 for k in range(-25, 26)]
    assert [tuple(c) for c in tab.run(f"{shares}.map(colour)")] == [colour(s) for s in shares]
    assert tab.run(f"{shares}.map(s => isDark(colour(s)))") == [is_dark(colour(s)) for s in shares]
    values = [None, 3.0, 1.0, 3.0, 1.0]
    for closer in ("higher", "lower"):
        for skip in (-1, 1, 2):
            assert tab.run(f"best({json.dumps(values)}, '{closer}', {skip})") == best(values, closer, skip)
        scale = Scale.over([-3.0, 2.0], closer=closer)  # type: ignore[arg-type]
        assert tab.run(f"[-3, -1, 0, 2].map(v => share({json.dumps(scale.to_dict())}, v))") == [
            scale.share(v) for v in (-3, -1, 0, 2)
        ]


#: The lowest contrast of every colour of text and lines to what is behind it (WCAG 2.2).
CONTRAST = """(() => {
  const light = (name) => {
    const e = document.createElement("i");
    e.style.color = `var(${name})`;
    document.body.append(e);
    const c = getComputedStyle(e).color.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    e.remove();
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const names = ["--ink", "--muted", "--accent", "--open", "--s0", "--s1", "--s2", "--s3"];
  return Math.min(...names.flatMap((n) => ["--paper", "--card"].map((behind) => ratio(light(n), light(behind)))));
})()"""


def test_light_dark_and_print_differ_and_can_be_read(tab: Tab, pages: dict[str, Path], tmp_path: Path) -> None:
    seen = set()
    for dark in (False, True):
        tab.media(dark=dark)
        tab.open(pages["five"])
        seen.add(tab.screenshot(tmp_path / "page.png", whole=False))
        assert tab.run(CONTRAST) >= 4.5
        background = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
    assert len(seen) == 2
    tab.media("print", dark=True)
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert tab.run(
        "[...document.querySelectorAll('nav, .hint, .controls')].every(e => getComputedStyle(e).display === 'none')"
    )
    assert tab.run("getComputedStyle(document.querySelector('#table')).maxHeight") == "none"


def test_a_wide_window_keeps_the_readout_inside(tab: Tab, pages: dict[str, Path]) -> None:
    # So low that the numbers do not fit below a cell in the middle.
    tab.size(1200, 420)
    tab.open(pages["deep"])
    tab.choose("#measure", "rbf-cka")
    for i, j in ((0, 0), (32, 32), (0, 31), (32, 0)):
        tab.point(CELL.format(block="cross", panel="main", i=i, j=j))
        box = tab.run("(({left, right, top, bottom}) => [left, top, right, bottom])(READOUT.getBoundingClientRect())")
        assert 0 <= box[0] < box[2] <= 1200
        assert 0 <= box[1] < box[3] <= 420
