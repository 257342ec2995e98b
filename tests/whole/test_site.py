"""The documentation site: built strictly, without a network, with a place for every public name and every page."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import align
import evaluate
import featstore
from tests.support import ROOT

INVENTORY_HEAD = 4  # lines before the compressed part of an objects.inv


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `scripts/docs` makes it; a link or an anchor that leads nowhere fails here."""
    place = tmp_path_factory.mktemp("site")
    pages, out = place / "pages", place / "out"
    env = os.environ | {"SITE_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
    for words in (["scripts/_site.py", pages], ["-m", "mkdocs", "build", "--strict", "--site-dir", out]):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    """Names that have a place on the site, from its inventory."""
    *head, body = (site / "objects.inv").read_bytes().split(b"\n", INVENTORY_HEAD)
    assert head[0].startswith(b"# Sphinx inventory version 2")
    return {line.split()[0] for line in zlib.decompress(body).decode().splitlines() if line}


@pytest.mark.parametrize("package", [featstore, align, evaluate], ids=lambda package: package.__name__)
def test_every_public_name_has_a_place(package: object, documented: set[str]) -> None:
    names = {f"{package.__name__}.{name}" for name in package.__all__}
    assert names - documented == set(), "add a line `::: NAME` to the package's page in docs/reference"


def test_so_has_every_method_of_what_a_notebook_holds(documented: set[str]) -> None:
    methods = []
    for package in (featstore, align, evaluate):
        for name in package.__all__:
            kind = getattr(package, name)
            if not isinstance(kind, type):
                continue
            for each, value in vars(kind).items():
                # What scikit-learn and pydantic add is theirs to document.
                ours = getattr(getattr(kind, each), "__module__", "").startswith(("featstore", "align", "evaluate"))
                if each[0] != "_" and isinstance(value, FunctionType | classmethod | staticmethod) and ours:
                    methods.append(f"{package.__name__}.{name}.{each}")
    assert len(methods) > 30
    assert [name for name in methods if name not in documented] == []


def test_every_error_has_a_place(documented: set[str]) -> None:
    errors = [name for name, value in vars(featstore.errors).items() if isinstance(value, type) and name[0] != "_"]
    own = [name for name in errors if getattr(featstore.errors, name).__module__ == "featstore.errors"]
    assert len(own) > 20
    assert [name for name in own if f"featstore.errors.{name}" not in documented] == []


def test_every_document_decision_and_notebook_is_a_page(site: Path) -> None:
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in {".md", ".ipynb"}:
            assert (site / path.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), path
    assert "Two commands" in (site / "index.html").read_text()  # the README


def test_the_commands_page_has_every_option(site: Path) -> None:
    page = (site / "commands.html").read_text()
    for option in ("--shard-rows", "--layer-map", "--permutations", "--allow-side-channel", "--stitch-tokens"):
        assert f"<code>{option}</code>" in page, option


def test_pages_ask_nothing_of_a_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = path.read_text()
        assert re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"?(?:https?:)?//[^\s>]*", page) == [], path
        assert re.findall(r"<link[^>]*\bhref=\"?(?:https?:)?//[^\s>]*", page) == [], path


def test_lists_and_tables_are_rendered_as_such(site: Path) -> None:
    """A list without a blank line before it, which GitHub takes and the site does not, is text with dashes."""
    for path in site.rglob("*.html"):
        page = re.sub(r"<pre.*?</pre>", "", path.read_text(), flags=re.DOTALL)
        for paragraph in re.findall(r"<p>(.*?)</p>", page, re.DOTALL):
            assert not re.search(r"^(?:[-*] |1\. |\|)", paragraph, re.MULTILINE), f"{path.name}: {paragraph[:200]}"


def test_pictures_are_small_and_the_drawing_is_what_is_drawn() -> None:
    pictures = sorted((ROOT / "docs" / "pictures").iterdir())
    assert [path.name for path in pictures if path.stat().st_size > 150_000] == []
    assert [
        path.name for path in pictures if f"docs/pictures/{path.name}" not in (ROOT / "README.md").read_text()
    ] == []
    done = subprocess.run([sys.executable, ROOT / "scripts" / "pictures", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def layout() -> ModuleType:
    """`scripts/_site.py`, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("_site", ROOT / "scripts" / "_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outputs_of_a_notebook_are_shown_if_these_cells_were_run(layout: ModuleType, tmp_path: Path) -> None:
    path = ROOT / "docs" / "notebooks" / "two_models_to_a_map.ipynb"
    run = json.loads(path.read_text())
    code = [cell for cell in run["cells"] if cell["cell_type"] == "code"]
    warning = {"output_type": "stream", "name": "stderr", "text": ["a bar at 10 %"]}
    code[0]["outputs"] = [warning, {"output_type": "execute_result", "data": {"text/plain": ["what it", " printed"]}}]
    table = "<table>\n\n<tr><td>1</td></tr></table>"
    code[1]["outputs"] = [{"output_type": "execute_result", "data": {"text/html": table, "text/plain": "less"}}]
    code[2]["outputs"] = [{"output_type": "display_data", "data": {"image/png": "aGFsbG8=\n", "text/plain": "less"}}]
    layout.EXECUTED = tmp_path
    assert "what it printed" not in layout.notebook(path)
    (tmp_path / path.name).write_text(json.dumps(run))
    page = layout.notebook(path)
    assert "```text\nwhat it printed\n```" in page
    assert '<div class="output"><table>\n<tr><td>1</td></tr></table></div>' in page
    assert 'src="data:image/png;base64,aGFsbG8="' in page
    assert "less" not in page.replace("needless", "")
    assert "a bar" not in page
    code[3]["source"] = "something_else()"
    (tmp_path / path.name).write_text(json.dumps(run))
    assert "what it printed" not in layout.notebook(path)


def test_links_out_of_the_documents_lead_to_copies(layout: ModuleType) -> None:
    text = "[a](../LICENSE) [b](how-to/maps.md#x) `[c](../LICENSE)` [d](https://x.org) [e](../README.md)"
    page, copies = layout.led(text, ROOT / "docs" / "api.md", "api.md")
    assert page == "[a](repository/LICENSE) [b](how-to/maps.md#x) `[c](../LICENSE)` [d](https://x.org) [e](index.md)"
    assert copies == {"repository/LICENSE": ROOT / "LICENSE"}
