"""``python -m featstore.demo.training``: train the small model again, as the one in the package was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.runtime.console import check_directory, emit, run_app

app = typer.Typer(add_completion=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = Path("small"),
    cache: Annotated[Path, typer.Option(help="Where the text is kept.")] = Path(".cache/demo/assets"),
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order; the released model has 0.")] = 0,
    beside: Annotated[Path | None, typer.Option(help="Another model's directory, to be measured as well.")] = None,
    as_json: Json = False,
) -> None:
    """Train the small model on Wikipedia articles that the demo does not read."""
    from featstore.demo.training.recipe import describe, train_small

    check_directory(out)
    figures = train_small(out, cache, seed=seed, beside=beside)
    emit(figures, describe(figures), as_json=as_json)


if __name__ == "__main__":
    run_app(app, "train_small")
