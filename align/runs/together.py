"""Several closed forms over the same rows, made together: what they have in common is read and computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from align.maps.registry import map_type
from align.runs.candidates import Reporting
from align.runs.job import resolve
from align.runs.rundir import RunDirectory, check_free
from align.runs.train import Run, carry_out, token_tables
from align.settings import Settings
from align.tokens.table import TokenTables
from featstore.errors import SpecError
from featstore.runtime.console import check_directory


def share(settings: Settings) -> Settings | None:
    """What runs have to have in common to be made together by :func:`train_together`.

    Args:
        settings: Of a run.

    Returns:
        Settings that are equal for such runs: those of the rows, without the map's. None for a run that is made alone:
        one trained by gradient, or whose layer pairs depend on the type or on each other.
    """
    if settings.by_gradient or map_type(settings.type).windows or settings.shared or settings.layer_map == "auto":
        return None
    bare = Settings(settings.store)
    loop = replace(settings.loop, rank=bare.loop.rank, skip=bare.loop.skip, alpha=None)
    # Those among principal components need the target's Gram matrix, which takes a product more.
    components = None if settings.components is None else "auto"
    return replace(settings, type=bare.type, scale=bare.scale, components=components, solver=None, loop=loop)


def train_together(runs: Sequence[tuple[Settings, Path]], *, quiet: bool = True) -> list[Exception | None]:
    """Carry out several closed forms over the same rows, each as :func:`train` would in a directory of its own.

    Rows are read once, and what the types of map have in common (the decomposition of a source, the control whose
    documents are exchanged, the baselines and their scores) is computed once.

    Args:
        runs: Settings, equal as :func:`share` sees them, and free directories.
        quiet: Whether to show no progress.

    Returns:
        Why a run could not be made, or None, by run.

    Raises:
        SpecError: The runs cannot be made together.
    """
    bases = [share(settings) for settings, _ in runs]
    if None in bases or any(base != bases[0] for base in bases):
        raise SpecError(
            "only closed forms over the same rows, layers and seed are fitted together; train the others alone"
        )
    tables: TokenTables | None = None
    begun: list[Run | Exception] = []
    for settings, out in runs:
        try:
            check_directory(out)
            check_free(out, resume=False)
            job = resolve(settings)
            tables = tables or token_tables(job)
            begun.append(Run(job, Reporting(RunDirectory(out, settings), None, None, False, quiet), tables))
        except Exception as error:  # noqa: BLE001 - whatever one run meets, the others go on
            begun.append(error)
    together = [run for run in begun if isinstance(run, Run)]
    if together:
        carry_out(together)
    for run in together:
        if run.failure is None:
            with run.guarded():
                run.finish()
    return [run.failure if isinstance(run, Run) else run for run in begun]
