"""Pages: bytes and load time of a report of 200 layer pairs and of a similarity page, in Chromium.

    python benchmarks/bench_pages.py

The report has 200 maps with losses under every condition, and a comparison of 10 by 20 layers with every measure. A
page's load time is wall time from the request until the browser has drawn two frames after the load event, in a new
tab every round; Chromium is the one installed, or the one that CHROMIUM names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _measure import at_most, judged, keep, machine, recorded, versions_of

from align.similarity.page import write
from evaluate.reporting import write_report
from tests.support.browser import Browser, find_chromium
from tests.support.many_pairs import write_run
from tests.support.similarity_fixture import similarity_result

PAIRS = 200
#: What a report of so many layer pairs may take.
MEGABYTES, SECONDS = 3.0, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds that count")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_pages.json")
    arguments = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        parser.error("no Chromium here: apt install chromium, or set CHROMIUM to one")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pages, written = made(root)
        profile = root / "profile"
        profile.mkdir()
        browser = Browser(executable, profile)
        try:
            loads: dict[str, list[float]] = {page: [] for page in pages}
            for round_ in range(arguments.runs + 1):
                for page, path in pages.items():
                    seconds = loaded(browser, path)
                    # The first round starts processes of the browser.
                    loads[page] += [seconds] if round_ else []
            version = browser.call("Browser.getVersion")["product"]
        finally:
            browser.close()
        sizes = {page: path.stat().st_size / 1e6 for page, path in pages.items()}
    for page, size in sizes.items():
        taken = sorted(loads[page])
        print(
            f"{page}: {size:.3f} MB, written in {written[page]:.2f} s, drawn in {taken[len(taken) // 2]:.3f} s "
            f"({taken[0]:.3f} .. {taken[-1]:.3f})"
        )
    goals = recorded(
        {
            f"report of {PAIRS} layer pairs, MB": at_most(MEGABYTES, sizes["report"]),
            f"report of {PAIRS} layer pairs, seconds until drawn": at_most(SECONDS, *loads["report"]),
        }
    )
    print(judged(goals))
    if arguments.keep:
        result = {
            "machine": machine(), "versions": versions_of("jinja2") | {"browser": version}, "pairs": PAIRS,
            "megabytes": sizes, "seconds": loads, "goals": goals,
        }  # fmt: skip
        print(keep("bench_pages", result))


def made(root: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """The pages and how long each took to write."""
    similar = root / "similarity"
    similar.mkdir()
    comparison = similarity_result(10, 20)
    (similar / "cka.json").write_text(json.dumps(comparison))
    run = write_run(root / "run", PAIRS, stitched=True)
    pages, written = {}, {}
    start = time.perf_counter()
    pages["similarity"] = similar / write(comparison, similar)
    written["similarity"] = time.perf_counter() - start
    start = time.perf_counter()
    write_report([run, similar], root / "report.html")
    pages["report"] = root / "report.html"
    written["report"] = time.perf_counter() - start
    return pages, written


def loaded(browser: Browser, path: Path) -> float:
    """Seconds until a page is drawn in a new tab."""
    with browser.tab() as tab:
        tab.size(1200, 900)
        start = time.perf_counter()
        tab.open(path)
        seconds = time.perf_counter() - start
        if tab.complaints:
            raise SystemExit(f"{path.name}: {tab.complaints[0]}")
        return seconds


if __name__ == "__main__":
    main()
