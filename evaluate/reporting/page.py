"""One self-contained HTML page about any number of run and CKA directories.

Everything shown is read from the directories' JSON files; nothing is measured here, and the page
needs no network. The same files give the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.pages.document import Pages
from evaluate.reporting.prose import abstract, notes, words
from evaluate.reporting.reading.inputs import Run, read_runs
from evaluate.reporting.reading.narrowed import narrowed
from evaluate.reporting.sections import (
    cka,
    communicate,
    curves,
    every,
    rates,
    sections,
    stitched,
    tables,
    texts,
    training,
    verified,
)
from featstore.errors import SpecError
from featstore.runtime.provenance import write_atomic

#: Good news beyond this many verdicts folds away; bad and unclear news never does.
_OPEN_VERDICTS = 4
#: Blocks of stitched losses beyond this many fold away, each by itself.
_OPEN_LOSSES = 2
#: Blocks listed at once, and rows of the leaderboard shown at once.
_LISTED, _BOARD_ROWS = 30, 60
#: Drawings over layers, and trained maps, beyond this many fold away.
_OPEN_CURVES, _OPEN_TRAININGS = 4, 4
#: Prompts beyond this many fold away.
_OPEN_PROMPTS = 8
#: Maps that a page shows in full, 50 kB each; of more, the best and the worst by validation, these many.
_BEST, _WORST = 150, 50


def build_report(dirs: Sequence[Path], base: Path | None = None) -> str:
    """Render the page.

    Args:
        dirs: Run, CKA and sweep directories, in the order they are to appear.
        base: Directory the page will lie in, from which its numbers link to their files; None for no links.

    Returns:
        A complete HTML document.

    Raises:
        AdapterError: A directory holds none of the files a report shows.
        CorruptDataError: A file is there but is not JSON.
    """
    return _render(read_runs(dirs, base))


def write_report(dirs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Render the page and put it in place atomically.

    Args:
        dirs: Run, CKA and sweep directories, in the order they are to appear.
        out: The HTML file; its directory is created.

    Returns:
        Where it is and what went into it, for the command's ``--json``.

    Raises:
        AdapterError: A directory holds none of the files a report shows.
        CorruptDataError: A file is there but is not JSON.
        SpecError: A directory is in its place.
        WriteError: The page cannot be written there.
    """
    runs = read_runs(dirs, out.parent)
    data = _render(runs).encode()
    if out.is_dir():
        raise SpecError(f"{out} is a directory; name a file for the report, such as report.html")
    write_atomic(out, data)
    judged = words.verdicts(runs)
    return {
        "out": str(out),
        "bytes": len(data),
        "directories": [run.label for run in runs],
        "files": [source.name for source in sections.files(runs)],
        "maps": len(judged),
        "beat_controls": sum(verdict.kind == "good" for verdict in judged),
        "warnings": len(notes.warnings(runs)),
        "missing": [gap.text.striptags() for gap in notes.gaps(runs)],
    }


@functools.cache
def _pages() -> Pages:
    return Pages("evaluate.reporting", "report.html.j2", "report.css", ("report.js",))


def _render(runs: Sequence[Run]) -> str:
    judged = words.verdicts(runs)
    warned = notes.warnings(runs)
    similarities = [cka.similarity(run) for run in runs]
    charts = (curves.r2_by_layer(runs), curves.recovered_by_layer(runs))
    every_map, all_runs, maps = None, runs, len(judged)
    detailed = judged
    if maps > _BEST + _WORST:
        every_map = every.every_map([(verdict.run, verdict.pair, verdict.tag) for verdict in judged])
        detailed = [*judged[:_BEST], *judged[-_WORST:]]
        runs = _few(runs, detailed)
    return _pages().render(
        title=sections.title(all_runs),
        headline=abstract.headline(all_runs, judged),
        sentences=abstract.sentences(all_runs, judged, warned),
        facts=sections.compared(all_runs),
        every_map=every_map,
        maps=maps,
        best=_BEST,
        worst=_WORST,
        verified=verified.verified(runs),
        verified_columns=verified.COLUMNS,
        runs=runs,
        verdicts=_folded(detailed),
        warnings=warned,
        gaps=notes.gaps(runs),
        columns=tables.COLUMNS,
        leaderboard=tables.leaderboard(runs),
        r2_chart=charts[0],
        forest=stitched.forest(runs),
        recovered_chart=charts[1],
        curves=[chart for run in runs for chart in curves.stitched_curves(run)],
        stitched=[block for run in runs for block in stitched.stitched_losses(run)],
        conditions=stitched.CONDITIONS,
        rates=rates.rates(runs),
        similarities=[similarity for similarity in similarities if similarity is not None],
        trainings=[curve for run in runs for curve in training.trainings(run)],
        exchanges=[exchange for run in runs for exchange in communicate.exchanges(run)],
        prompts=texts.prompts(runs),
        decodings=texts.decodings(runs),
        open_losses=_OPEN_LOSSES,
        listed=_LISTED,
        board_rows=_BOARD_ROWS,
        open_curves=_OPEN_CURVES,
        open_trainings=_OPEN_TRAININGS,
        open_prompts=_OPEN_PROMPTS,
        files=sections.files(runs),
        versions=sections.versions(runs),
        command=notes.command,
    )


def _few(runs: Sequence[Run], detailed: Sequence[words.Verdict]) -> list[Run]:
    kept: dict[str, set[str]] = {}
    for verdict in detailed:
        kept.setdefault(verdict.run.label, set()).add(verdict.pair.key)
    return narrowed(runs, kept)


def _folded(
    judged: Sequence[words.Verdict],
) -> tuple[list[words.Verdict], list[words.Verdict]]:
    folds = [i >= _OPEN_VERDICTS and v.kind not in ("poor", "open") for i, v in enumerate(judged)]
    pairs = list(zip(judged, folds, strict=True))
    return [v for v, fold in pairs if not fold], [v for v, fold in pairs if fold]
