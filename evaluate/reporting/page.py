"""One self-contained HTML page about any number of run and CKA directories.

Everything shown is read from the directories' JSON files; nothing is measured here, and the page
needs no network. The same files give the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaluate.reporting.prose import abstract, notes, words
from evaluate.reporting.reading.inputs import Run, read_runs
from evaluate.reporting.sections import (
    cka,
    communicate,
    curves,
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
#: Drawings over layers, and trained maps, beyond this many fold away.
_OPEN_CURVES, _OPEN_TRAININGS = 4, 4
#: Prompts beyond this many fold away.
_OPEN_PROMPTS = 8


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
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("evaluate.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(runs: Sequence[Run]) -> str:
    judged = words.verdicts(runs)
    warned = notes.warnings(runs)
    similarities = [cka.similarity(run) for run in runs]
    charts = (curves.r2_by_layer(runs), curves.recovered_by_layer(runs))
    script, style = _text("report.js"), _text("report.css")
    # As strict as a page can be: even text that slipped through escaping would neither run nor load anything.
    policy = f"default-src 'none'; img-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            policy=f"{policy}; base-uri 'none'; form-action 'none'",
            script=script,
            style=style,
            title=sections.title(runs),
            headline=abstract.headline(runs, judged),
            sentences=abstract.sentences(runs, judged, warned),
            facts=sections.compared(runs),
            verified=verified.verified(runs),
            verified_columns=verified.COLUMNS,
            runs=runs,
            verdicts=_folded(judged),
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
            open_curves=_OPEN_CURVES,
            open_trainings=_OPEN_TRAININGS,
            open_prompts=_OPEN_PROMPTS,
            files=sections.files(runs),
            versions=sections.versions(runs),
            command=notes.command,
        )
    )


def _folded(
    judged: Sequence[words.Verdict],
) -> tuple[list[words.Verdict], list[words.Verdict]]:
    shown = [v for i, v in enumerate(judged) if i < _OPEN_VERDICTS or v.kind in ("poor", "open")]
    return shown, [v for v in judged if v not in shown]


def _text(name: str) -> Markup:
    loader = _environment().loader
    if loader is None:
        raise jinja2.TemplateNotFound(name)
    return Markup(loader.get_source(_environment(), name)[0])  # noqa: S704 (a file of this package)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
