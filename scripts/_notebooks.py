"""Run the notebooks under docs/notebooks, so that the documentation site shows their outputs.

    python scripts/_notebooks.py [NAME ...]

Executed copies go to .cache/notebooks; the committed ones have no outputs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ROOT / ".cache" / "notebooks"


def execute(path: Path) -> None:
    """Run one notebook in a folder of its own, with the demo models that are there."""
    notebook = nbformat.read(path, as_version=4)
    place = Path(tempfile.mkdtemp())
    try:
        (ROOT / ".cache" / "demo").mkdir(parents=True, exist_ok=True)
        (place / ".cache").mkdir()
        (place / ".cache" / "demo").symlink_to(ROOT / ".cache" / "demo")
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(place)}}).execute()
    finally:
        shutil.rmtree(place)
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / path.name)


if __name__ == "__main__":
    for each in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        if not sys.argv[1:] or each.stem in sys.argv[1:]:
            execute(each)
