"""Documentation runs: Python blocks are executed, commands parsed by the real command line, links followed."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

import align.cli
import evaluate.cli
import featstore.cli
from featstore.demo.sample import sample_texts
from tests.support import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    path for folder in ("docs", "changes") for path in (ROOT / folder).rglob("*.md")
)
TOOLS = {"featstore": featstore.cli.app, "align": align.cli.app, "evaluate": evaluate.cli.app}
#: What a link or a picture leads to, without the place on the page; anchors are checked where the site is built.
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (str(page.relative_to(ROOT)), body)
        for page in PAGES
        for found, body in BLOCK.findall(page.read_text())
        if found == language
    ]


def lines() -> list[list[str]]:
    """Words of every line of the shell blocks."""
    split = [shlex.split(line, comments=True) for _, body in blocks("sh") for line in body.splitlines()]
    return [words for words in split if words]


def commands() -> list[list[str]]:
    """Commands of ours, also behind `./scripts/reproduce` and launchers of several processes."""
    found = []
    for words in lines():
        if words[0] in {"torchrun", "accelerate"}:
            words = words[words.index("-m") + 1 :]
        elif words[0] == "./scripts/reproduce":
            words = ["evaluate", "reproduce", *words[1:]]
        if words[0] in TOOLS:
            found.append(words)
    return found


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_documented_commands_parse(words: list[str]) -> None:
    group = typer.main.get_command(TOOLS[words[0]])
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[words[1]]
    context = command.make_context(words[1], list(words[2:]))
    assert context.params


def test_there_are_commands_to_parse() -> None:
    assert {words[0] for words in commands()} == set(TOOLS)
    assert any(words[0] == "torchrun" for words in lines())


def test_documented_scripts_are_there() -> None:
    named = {words[0] for words in lines() if words[0].startswith("./")}
    assert len(named) > 5
    assert [name for name in named if not os.access(ROOT / name, os.X_OK)] == []


@pytest.mark.parametrize(
    "words", [[tool, name] for tool, app in TOOLS.items() for name in typer.main.get_command(app).commands]
)
def test_every_command_is_in_the_table_of_commands(words: list[str]) -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    [row] = [line for line in page.splitlines() if line.startswith("| `") and f"`{words[0]} {words[1]}`" in line] or [
        line for line in page.splitlines() if line.startswith(f"| `{words[0]} ") and f", `{words[1]}`" in line
    ]
    assert row.count("|") == 3, row


def test_the_readme_is_three_screens_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 130
    for command in ("./scripts/demo", "./scripts/test", "./scripts/docs"):
        assert command in readme
    linked = {(ROOT / target).resolve() for target in LINK.findall(readme) if "://" not in target}
    for page in sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "how-to").glob("*.md")):
        assert page in linked, f"the README leads to no {page.relative_to(ROOT)}"


@pytest.mark.parametrize(("page", "body"), blocks("python"))
def test_python_blocks_run(
    page: str, body: str, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wt103.zarr").symlink_to(tiny_store)
    monkeypatch.chdir(tmp_path)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(body, page, "exec"), {})
    assert output.getvalue()


#: Modules with examples in their docstrings.
EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in TOOLS
    for path in (ROOT / room).rglob("*.py")
    if re.search(r"^ *>>> ", path.read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_say_what_is_true(
    name: str, tiny_store: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wt103.zarr").symlink_to(tiny_store)
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "articles").mkdir()
    for number, text in enumerate(sample_texts()[:4]):
        (tmp_path / "articles" / f"{number}.txt").write_text(text[:300], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed


def test_there_are_examples() -> None:
    assert {"align.api", "align.closed_form.estimators"} <= set(EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_room_is_in_the_architecture_document() -> None:
    """Every package, and every module beside the rooms; inside a room a module's first line says its one idea."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for top in TOOLS:
        for place in sorted((ROOT / top).iterdir()):
            if place.suffix == ".py" and not place.name.startswith("__"):
                assert f"`{top}/{place.name}`" in text, place
        for package in sorted((ROOT / top).rglob("__init__.py")):
            room = package.parent
            named = [f"`{room.relative_to(ROOT)}/`", f"`{room.name}/`"]
            # A package of packages is there by what is in it.
            inside = any(child.is_dir() and (child / "__init__.py").exists() for child in room.iterdir())
            assert inside or any(name in text for name in named), f"{room.relative_to(ROOT)} is not in the document"


def test_the_page_of_goals_is_what_benchmarks_keep() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "goals.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
