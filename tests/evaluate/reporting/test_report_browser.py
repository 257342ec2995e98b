"""The report in a browser: alone with itself, sortable, readable by eye, key and touch at any width."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.judging.findings import finding
from align.pages.palette import Scale
from evaluate.reporting import write_report
from tests.evaluate.reporting.test_report_evidence import warned, whole, windows
from tests.evaluate.reporting.test_report_parts import full as every_kind
from tests.support import report_fixtures as made
from tests.support.browser import Browser, Tab, browser
from tests.support.drawings import cells, drawing, drawings, marks, unpacked
from tests.support.many_pairs import write_run

__all__ = ["browser"]

HOSTILE = '</script><script>window.ran=1</script><img src="https://example.org/x.png" onerror="window.ran=1">'
LOSS = "svg[aria-label^='Loss under every condition']"
CURVE = "svg[aria-label$='loss by layer, layers']"
HEAT = "svg[aria-label='smol × twin, similar']"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def full(root: Path) -> Path:
    """A page with something in every section."""
    write_report(every_kind(root), root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def hostile(root: Path) -> Path:
    """A page whose every name is markup, or long without a space."""
    files = made.documents()
    long = "x" * 120
    key = f"{long}:1->{HOSTILE}:2"
    for name in ("metrics.json", "stitch.json"):
        files[name]["pairs"] = {key: files[name]["pairs"][made.PAIR]}
    files["metrics.json"]["pairs"][key]["warnings"] = [{"code": HOSTILE, "message": long}]
    tasks = files["communicate.json"]["tasks"]
    tasks[HOSTILE] = tasks.pop("countries") | {"warnings": [long, HOSTILE]}
    tasks[HOSTILE]["conditions"][long] = tasks[HOSTILE]["conditions"]["aligned"]
    (entry,) = files["generations.json"]["entries"]
    entry |= {"prompt": HOSTILE + long, "target_alone": HOSTILE, "source_to_target": {key: {"mapped": long}}}
    files["cka.json"] = json.loads(json.dumps(made.measured()).replace("smol", long))
    write_report([made.write(root / "y<b>", files, made.log())], root / "hostile.html")
    return root / "hostile.html"


@pytest.fixture(scope="module")
def evidence(root: Path) -> Path:
    """A page with many warnings of one kind, gains, and answers against rate."""
    runs = [made.write(root / f"m{m}", windows(m, 0.2 + m / 40)) for m in (4, 16)]
    runs.append(made.run_of(root, "whole", communicate=whole()))
    keys = [f"smol:{k}->twin:{k}" for k in range(30)]
    found = warned({key: [finding("few-rows", rows=k + 1, width=576, wanted=5760)] for k, key in enumerate(keys)})
    runs.append(made.write(root / "deep", found))
    write_report(runs, root / "evidence.html")
    return root / "evidence.html"


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as tab:
        tab.size(1200, 900)
        tab.media()
        yield tab


def column(tab: Tab, place: int) -> list[str]:
    """What the visible rows of the leaderboard sort by."""
    return tab.run(
        "[...document.querySelectorAll('#leaderboard .board tbody tr')].filter(r => r.offsetParent)"
        f".map(r => r.cells[{place}].dataset.sort)"
    )


def hidden(tab: Tab) -> bool:
    return tab.run("document.getElementById('readout').hidden")


def said(tab: Tab) -> str:
    """The readout, its value first."""
    for _ in range(100):
        if not hidden(tab):
            break
        tab.settle()  # a plot that was out of view scrolls into it
    assert not hidden(tab)
    return tab.run("[...document.getElementById('readout').childNodes].map(n => n.textContent).join(' | ')")


@pytest.mark.parametrize("name", ["full", "hostile", "evidence"])
def test_the_page_loads_alone_and_without_complaint(
    tab: Tab, name: str, full: Path, hostile: Path, evidence: Path
) -> None:
    file = {"full": full, "hostile": hostile, "evidence": evidence}[name]
    tab.open(file)
    assert tab.complaints == []
    assert tab.requests == [file.resolve().as_uri()]
    assert tab.run("window.ran") is None
    assert tab.run("document.querySelectorAll('script:not([type])').length") == 1
    # The style is allowed by its hash: were it refused, the page would be bare.
    assert tab.run("getComputedStyle(document.querySelector('.verdict')).borderLeftWidth") == "4px"
    assert tab.run("document.querySelector('.scripted').hidden") is False
    assert tab.run("fetch('https://example.org').then(() => 'fetched', () => 'refused')") == "refused"


def test_links_lead_to_files_that_are_there(tab: Tab, full: Path) -> None:
    tab.open(full)
    links = set(tab.run("[...document.querySelectorAll('a')].map(a => a.href)"))
    page = full.resolve().as_uri()
    files = {link.removeprefix("file://") for link in links if not link.startswith(page)}
    assert len(files) > 10
    assert all(Path(file).is_file() for file in files)
    assert {link.partition("#")[2] for link in links if link.startswith(page)} <= set(
        tab.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    )


def test_the_leaderboard_sorts_both_ways_with_gaps_last(tab: Tab, full: Path) -> None:
    tab.open(full)
    tab.click("#beside")
    headings = tab.run("[...document.querySelectorAll('.board th')].map(h => h.innerText.trim())")
    for title in ("R²", "recovered", "beyond token"):
        place = headings.index(title)
        button = f".board th:nth-child({place + 1}) button"
        before = sorted(column(tab, place))
        for sign, state in ((-1, "descending"), (1, "ascending")):
            tab.click(button)
            shown = column(tab, place)
            known = [float(value) for value in shown if value]
            assert len(set(known)) > 2
            assert known == sorted(known, key=lambda value: sign * value)
            assert shown[len(known) :] == [""] * (len(shown) - len(known))
            assert sorted(shown) == before
            sorted_by = "[...document.querySelectorAll('.board th:not([aria-sort=none])')].map(h => h.ariaSort)"
            assert tab.run(sorted_by) == [state]
    tab.click(".board th:nth-child(1) button")
    names = column(tab, 0)
    assert names == sorted(names)
    assert len(set(names)) > 2


def test_maps_come_first_and_controls_when_they_are_asked_for(tab: Tab, full: Path) -> None:
    tab.open(full)
    maps = column(tab, 2)
    assert len(maps) == 6
    tab.click("#beside")
    whole = column(tab, 2)
    assert any(what.startswith("control") for what in whole)
    assert maps == [what for what in whole if not re.match("control|closed|same rate", what)]
    tab.click("#beside")
    assert column(tab, 2) == maps


def test_the_leaderboard_is_filtered_by_type_and_layer(tab: Tab, full: Path) -> None:
    tab.open(full)
    names = tab.run("[...document.querySelectorAll('#board-controls .filters label')].map(l => l.firstChild.data)")
    assert names == ["type", "layer"]  # there is one direction
    for place, (cell, value, fits) in enumerate(((2, "Procrustes", r"Procrustes$"), (1, "30", r"\w+:30 →"))):
        select = f"#board-controls .filters label:nth-child({place + 1}) select"
        before = column(tab, cell)
        tab.choose(select, value)
        shown = column(tab, cell)
        assert 0 < len(shown) < len(before)
        assert shown == [text for text in before if re.match(fits, text)]
    tab.choose("#board-controls .filters label:nth-child(1) select", "Compress")
    assert column(tab, 0) == []
    assert "no row is like that" in tab.text("#board-controls")


def test_numbers_say_where_they_come_from(tab: Tab, full: Path) -> None:
    tab.open(full)
    tab.point("#leaderboard data")
    place = "document.querySelector('#leaderboard data')"
    value, origin, title = tab.run(f"[{place}.value, {place}.dataset.from, {place}.title]")
    file, _, keys = origin.partition("#/")
    assert title == f"{value} in {file} › {keys.replace('/', ' › ')}"


def test_drawings_lie_where_their_data_are(tab: Tab, full: Path) -> None:
    tab.open(full)
    wanted = drawing(unpacked(full.read_text()), "Loss under every condition, smol:15 → twin:15, run")
    values = [mark[0] for _, line, *_ in wanted["lines"] for mark in line]
    found = tab.run(
        "[...document.querySelectorAll(\"svg[aria-label='Loss under every condition, smol:15 → twin:15, run'] .points"
        ' > circle")].map(c => [c.ariaLabel, Number(c.getAttribute("cx"))])'
    )
    assert [says for says, _ in found] == [says for says, _, _ in marks(wanted)]
    places = [x for _, x in found]
    low, high = min(values), max(values)
    scale = (max(places) - min(places)) / (high - low)
    assert places == pytest.approx([min(places) + scale * (value - low) for value in values], abs=0.1)


def test_cells_have_the_colours_of_their_values(tab: Tab, full: Path) -> None:
    tab.open(full)
    found = tab.run(f'[...document.querySelectorAll("{HEAT} .cell")].map(c => [c.ariaLabel, c.getAttribute("fill")])')
    [spec] = [one for one in drawings(unpacked(full.read_text())) if one["label"] == "smol × twin, similar"]
    assert [says for says, _ in found] == [says for says, _ in cells(spec)]
    scale = Scale(**spec["scale"])
    for (_, fill), (_, value) in zip(found, cells(spec), strict=True):
        assert fill == ("url(#hatch)" if math.isnan(value) else "#{:02x}{:02x}{:02x}".format(*scale.rgb(value)))


def test_everything_can_be_unfolded(tab: Tab, evidence: Path) -> None:
    tab.open(evidence)
    assert tab.run("document.querySelectorAll('script[type=\"application/zlib\"]').length") > 0
    tab.run("unfoldAll()")
    assert tab.run("document.querySelectorAll('details:not([open])').length") == 0
    assert tab.run("document.querySelectorAll('script[type=\"application/zlib\"]').length") == 0
    assert tab.run("[...document.querySelectorAll('.chart')].filter(c => !c.querySelector('.plot')).length") == 0
    assert tab.complaints == []
    assert tab.overflow() <= 0


def test_marks_answer_to_the_mouse(tab: Tab, full: Path) -> None:
    tab.open(full)
    assert hidden(tab)
    tab.point(f"{LOSS} .points.mapped circle")
    assert said(tab) == "4.79 [4.58, 5] | mapped"
    tab.point(f"{HEAT} .cell")
    assert said(tab) == "0.951234 | smol 0 × twin 0"
    assert tab.run("document.querySelectorAll('.cursor').length") == 1
    tab.point(f"{HEAT} .cell.null")
    assert said(tab) == "– (HSIC of twin:15 is not positive) | smol 15 × twin 15"
    # Near a point is near enough; far from all of them says nothing.
    x, y = tab.centre(f"{CURVE} .points.s0 > *")
    for away, silent in ((12, False), (60, True)):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + away, y=y + away / 12)
        tab.settle()
        assert hidden(tab) is silent
    tab.point(f"{CURVE} .points.s0 > *")
    assert said(tab) == "6 [5.79, 6.21] | mapped, smol:0 → twin:0"
    tab.point("h1")
    assert hidden(tab)
    assert tab.run("document.querySelectorAll('.on, .cursor').length") == 0


def test_marks_answer_to_the_keyboard(tab: Tab, full: Path) -> None:
    tab.open(full)
    tab.run(f"document.querySelector(\"{HEAT} [tabindex='0']\").focus()")
    tab.settle()
    assert said(tab).endswith("| smol 0 × twin 0")
    for key, place in (
        ("ArrowRight", "smol 0 × twin 15"),
        ("ArrowUp", "smol 15 × twin 15"),
        ("ArrowRight", "smol 15 × twin 30"),
        ("ArrowRight", "smol 15 × twin 30"),
        ("ArrowDown", "smol 0 × twin 30"),
        ("ArrowLeft", "smol 0 × twin 15"),
    ):
        tab.press(key)
        assert said(tab).endswith(f"| {place}")
    tab.press("Escape")
    assert hidden(tab)
    tab.run(f"document.querySelector(\"{CURVE} [tabindex='0']\").focus()")
    tab.settle()
    assert said(tab).endswith("mapped, smol:0 → twin:0")
    tab.press("ArrowRight")
    assert said(tab).endswith("smol:15 → twin:15")
    tab.run("document.activeElement.blur()")
    assert hidden(tab)


def test_marks_answer_to_a_tap(tab: Tab, full: Path) -> None:
    tab.size(390, 844, phone=True)
    tab.open(full)
    tab.tap(f"{CURVE} .points.s0 > *")
    assert said(tab) == "6 [5.79, 6.21] | mapped, smol:0 → twin:0"
    box = tab.run("(({left, right, top, bottom}) => [left, top, right, bottom])(readout.getBoundingClientRect())")
    assert 0 <= box[0] < box[2] <= 390
    assert 0 <= box[1] < box[3] <= 844
    assert box[0] <= tab.centre(f"{CURVE} .points.s0 > *")[0] <= box[2]
    # Beside the plot, which is still in view.
    tab.tap(f"figure:has({CURVE}) figcaption")
    assert hidden(tab)
    assert tab.run("document.querySelectorAll('.on').length") == 0


@pytest.mark.parametrize("width", [320, 375, 768, 1200])
@pytest.mark.parametrize("name", ["full", "hostile", "evidence"])
def test_no_page_is_wider_than_its_window(
    tab: Tab, width: int, name: str, full: Path, hostile: Path, evidence: Path
) -> None:
    tab.size(width, 844, phone=width < 700)
    tab.open({"full": full, "hostile": hostile, "evidence": evidence}[name])
    tab.run("unfoldAll()")
    tab.settle()
    assert tab.overflow() <= 0
    outside = (
        "[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert tab.run(outside) == []


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
  const names = ["--ink", "--muted", "--accent", "--good", "--poor", "--open"];
  for (let k = 0; k < 6; k++) names.push(`--s${k}`);
  const pairs = names.flatMap((n) => ["--paper", "--card"].map((behind) => [n, behind])).concat([["--ink", "--mark"]]);
  return Math.min(...pairs.map(([a, b]) => ratio(light(a), light(b))));
})()"""


def test_light_dark_and_print_differ_and_can_be_read(tab: Tab, full: Path, tmp_path: Path) -> None:
    seen = set()
    for dark in (False, True):
        tab.media(dark=dark)
        tab.open(full)
        seen.add(tab.screenshot(tmp_path / "page.png", whole=False))
        assert tab.run(CONTRAST) >= 4.5
        background = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
        assert (tab.run("getComputedStyle(document.querySelector('.cells')).filter") != "none") == dark
    assert len(seen) == 2
    tab.media("print", dark=True)
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert tab.run(CONTRAST) >= 4.5
    shown = (
        "[...document.querySelectorAll('nav, .controls')].filter(e => getComputedStyle(e).display !== 'none').length"
    )
    assert tab.run(shown) == 0


def sorts(tab: Tab, table: str, title: str) -> list[str]:
    """What a table's column sorts by, after a click on its heading."""
    headings = tab.run(f"[...document.querySelectorAll('{table} th')].map(h => h.innerText.trim())")
    place = headings.index(title)
    tab.click(f"{table} th:nth-child({place + 1}) button")
    return tab.run(f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[{place}].dataset.sort)")


def test_gains_and_rates_sort_and_answer_to_the_mouse(tab: Tab, evidence: Path) -> None:
    tab.open(evidence)
    at = "document.querySelectorAll('[aria-label=\"countries, gains\"]')"
    tab.run(f"{at}[2].id = 'gains'")
    assert sorts(tab, "#gains", "over random") == ["0.5", "0.05"]
    assert sorts(tab, "#gains", "over random") == ["0.05", "0.5"]
    assert sorts(tab, "#gains", "sent") == ["aligned", "replace"]
    tab.point("#gains svg[aria-label^='replace'][aria-label*='over random'] .m.level circle")
    assert said(tab).startswith("0.05 [\u22120.1, 0.2] | replace")
    # The whisker of a gain shown to be one has the colour of good news.
    colour = "getComputedStyle(document.querySelector('#gains .m.{}')).color"
    assert tab.run(colour.format("above")) != tab.run(colour.format("level"))
    rates = "[aria-label='Rates, smol:15 → twin:15']"
    tab.run(f'document.querySelector("{rates}").id = "kept"')
    assert sorts(tab, "#kept", "bytes per text byte") == ["400.0", "1.5", "1.0", "1.0", "0.25"]
    tab.point("svg[aria-label^='Right answers against rate'] .points.s5 > *")
    assert "bytes per byte of text" in said(tab)


def test_many_warnings_of_a_kind_take_one_line_and_unfold(tab: Tab, evidence: Path) -> None:
    tab.open(evidence)
    item = "[...document.querySelectorAll('.notes.warn > li')].find(li => li.innerText.includes('few-rows'))"
    text = tab.run(f"{item}.innerText")
    # The other runs of the page have one such finding each, of a layer pair that is among the thirty.
    assert "33 times; smol:15 → twin:15, smol:0 → twin:0, smol:1 → twin:1" in text
    assert "and 26 more; in m4, m16, whole, deep" in text
    assert tab.run(f"{item}.getBoundingClientRect().height") < 90
    tab.run(f"{item}.querySelector('summary').click()")
    unfolded = tab.run(f"{item}.innerText")
    assert all(f"{k + 1} pairs" in unfolded and f"smol:{k} → twin:{k}" in unfolded for k in range(30))


def test_the_leaderboard_scrolls_in_its_box_under_its_headings(tab: Tab, evidence: Path) -> None:
    tab.open(evidence)
    box = "document.querySelector('.tall')"
    assert tab.run(f"{box}.scrollHeight - {box}.clientHeight") > 200
    assert tab.run(f"{box}.clientHeight") <= 900
    tab.run(f"{box}.scrollTop = 400")
    tab.settle()
    top, head = (tab.run(f"{e}.getBoundingClientRect().top") for e in (box, f"{box}.querySelector('th:nth-child(4)')"))
    assert head == pytest.approx(top, abs=1)
    tab.media("print")
    assert tab.run(f"{box}.scrollHeight - {box}.clientHeight") <= 1


def test_letters_of_plots_and_tables_can_be_read(tab: Tab, evidence: Path) -> None:
    small = (
        "Math.min(...[...document.querySelectorAll('main svg text, main td, main th')].filter(e => e.textContent.trim()"
        " && e.getClientRects().length).map(e => parseFloat(getComputedStyle(e).fontSize)"
        " * (e.ownerSVGElement ? e.ownerSVGElement.getBoundingClientRect().width"
        " / e.ownerSVGElement.viewBox.baseVal.width : 1)))"
    )
    for width, least in ((1200, 10.5), (390, 9.5)):
        tab.size(width, 844, phone=width < 700)
        tab.open(evidence)
        assert tab.run(small) >= least


def test_sections_say_what_was_measured(tab: Tab, full: Path) -> None:
    tab.open(full)
    text = tab.run("document.body.innerText")
    for words in (
        "beats every control",
        "The highest control is",
        "Most alike are",
        "failed-cell",
        "the text itself",
    ):
        assert words in text
    marked = tab.run("[...document.querySelectorAll('#texts .card mark, #texts .text mark')].map(m => m.textContent)")
    assert "a list of albums" in marked


def test_all_maps_of_a_large_report_are_searched_and_sorted(tab: Tab, root: Path) -> None:
    run = write_run(root / "many", 230)
    write_report([run], root / "many.html")
    tab.open(root / "many.html")
    assert tab.complaints == []
    tab.run("document.getElementById('every-maps').open = true")
    tab.settle()
    rows = "[...document.querySelectorAll('#every-table tbody tr')].map(r => r.cells[{}].textContent)"
    assert len(tab.run(rows.format(1))) == 100
    said = "document.querySelector('#every-controls [role=status]').textContent"
    assert tab.run(said) == "1 to 100 of 230"
    on = "document.querySelector('#every-controls button:last-child')"
    for _ in range(2):
        tab.run(f"{on}.click()")
    assert len(tab.run(rows.format(1))) == 30
    assert tab.run(f"{on}.disabled") is True
    tested = [pair["test"]["r2"] for pair in json.loads((run / "metrics.json").read_text())["pairs"].values()]
    for order in (sorted(tested, reverse=True), sorted(tested)):
        tab.run("document.querySelectorAll('#every-table th button')[7].click()")
        shown = [float(text.replace("\u2212", "-")) for text in tab.run(rows.format(7))]
        assert shown == pytest.approx(order[:100], abs=6e-4)
    # By layer from a list, by words from a box.
    tab.choose("#every-controls label select", "7")
    assert {text.split(" ")[0] for text in tab.run(rows.format(1))} == {"smol:7"}
    box = "{{ const box = document.querySelector('#every-controls input')"
    search = f"{box}; box.value = {{!r}}; box.dispatchEvent(new Event('input')) }}}}"
    tab.run(search.format("smol:7 twin:2"))
    assert tab.run(rows.format(1)) == ["smol:7 → twin:2"]
    tab.run(search.format("nothing like it"))
    assert tab.run(rows.format(1)) == []
    assert tab.run(said) == "no row is like that"
