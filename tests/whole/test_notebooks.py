"""The notebooks run from the first cell to the last, as they are committed: without outputs, through the public API."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"
OURS = ("featstore", "align", "evaluate")


def opened(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def run(name: str, place: Path) -> list[Any]:
    """Execute a notebook in a folder of its own and give its code cells with their outputs."""
    notebook = opened(name)
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells: list[Any], kind: str) -> list[str]:
    """What the cells show of one kind, such as ``text/html``."""
    outputs = [output for cell in cells for output in cell.outputs]
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def names() -> list[str]:
    return sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", names())
def test_a_notebook_is_committed_without_outputs_and_uses_the_api_alone(name: str) -> None:
    notebook = opened(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    assert all("." not in each.name for each in node.names if each.name.startswith(OURS))
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith(OURS)


def test_two_models_to_a_map_has_ten_cells() -> None:
    assert sum(cell.cell_type == "code" for cell in opened("two_models_to_a_map.ipynb").cells) == 10


@pytest.mark.thorough
def test_your_own_model_and_text(tmp_path: Path) -> None:
    cells = run("your_own_model_and_text.ipynb", tmp_path)
    assert "Leaderboard" in "".join(shown(cells, "text/plain"))
    assert "mine:2->other:2" in shown(cells, "text/plain")[-1]
    assert (tmp_path / "affine" / "stitch.json").is_file()


@pytest.mark.demo_pair
def test_two_models_to_a_map(tmp_path: Path, demo_models: Any) -> None:
    # The models that the other tests use, instead of another download.
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "demo").symlink_to(Path(os.fspath(demo_models.smollm2)).parent)
    cells = run("two_models_to_a_map.ipynb", tmp_path)
    assert len(shown(cells, "image/png")) == 2
    assert "smollm2:15->twin:15" in "".join(shown(cells, "text/plain"))
    assert (tmp_path / "report.html").stat().st_size > 10_000
