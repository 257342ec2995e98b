"""Pages of the documentation site, laid out in a folder for whatever renders them.

    python scripts/_site.py FOLDER

These are the files under docs/, and what is made: the home page is README.md; CHANGELOG.md and CONTRIBUTING.md are
pages; the commands' page ends in every option, as the commands know them; a notebook is a page of its cells, with
outputs where `scripts/docs --execute` has run these very cells; decisions are listed. A link of a page to any other
file of the repository leads to a copy of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
#: Notebooks that were run, by `scripts/docs --execute`.
EXECUTED = ROOT / ".cache" / "notebooks"
#: Files beside docs/ that are pages.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def lay_out(folder: Path) -> None:
    """Write every page, picture and linked file into a folder, which is emptied first."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(DOCS, folder)
    pages = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
    pages["commands.md"] += "\n" + options()
    pages["decisions/index.md"] = listing(
        "Decisions", "Choices that were not obvious, with what was measured.", decisions()
    )
    notebooks = {f"{path.stem}.md": notebook(path) for path in sorted((DOCS / "notebooks").glob("*.ipynb"))}
    pages |= {f"notebooks/{name}": text for name, text in notebooks.items()}
    pages["notebooks/index.md"] = listing("Notebooks", "The road from models to figures, cell by cell.", notebooks)
    pages |= {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    sources = {page: ROOT / source for source, page in PAGES.items()}
    left = list(pages)
    while left:
        name = left.pop()
        source = sources.get(name, DOCS / name)
        text, linked = led(pages[name], source, name)
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        for place, path in linked.items():
            if place in pages or (folder / place).exists():
                continue
            if path.suffix == ".md":
                pages[place], sources[place] = path.read_text(encoding="utf-8"), path
                left.append(place)
            else:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / place)


def led(text: str, source: Path, name: str) -> tuple[str, dict[str, Path]]:
    """A page whose links to files of the repository lead to places on the site, and what is to be copied to these."""
    linked: dict[str, Path] = {}

    def target(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(source.parent / match[2]))
        if "://" in match[2] or not path.exists():
            return match[0]  # what is not there is for the renderer to complain of
        place = site_path(path)
        if place.startswith("repository/"):
            linked[place] = path
        return match[1] + os.path.relpath(place, Path(name).parent) + match[3]

    # What is inside code is no link.
    return "".join(piece if n % 2 else LINK.sub(target, piece) for n, piece in enumerate(CODE.split(text))), linked


def site_path(path: Path) -> str:
    """Where a file or folder of the repository is on the site."""
    if path.is_dir():
        path /= "index.md"
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if path.is_relative_to(DOCS):
        inside = path.relative_to(DOCS)
        return str(inside.with_suffix(".md") if path.suffix == ".ipynb" else inside)
    return f"repository/{name}"


def decisions() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((DOCS / "decisions").glob("[0-9]*.md"))}


def listing(title: str, summary: str, pages: dict[str, str]) -> str:
    """A page that lists others by their titles."""
    lines = [f"- [{text.splitlines()[0].removeprefix('# ')}]({name})" for name, text in pages.items()]
    return f"# {title}\n\n{summary}\n\n" + "\n".join(lines) + "\n"


def notebook(path: Path) -> str:
    """A notebook as a page."""
    committed = json.loads(path.read_text(encoding="utf-8"))
    shown = committed
    executed = EXECUTED / path.name
    if executed.is_file():
        run = json.loads(executed.read_text(encoding="utf-8"))
        if [cell["source"] for cell in run["cells"]] == [cell["source"] for cell in committed["cells"]]:
            shown = run
    parts = []
    for cell in shown["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [part for output in cell.get("outputs", []) if (part := output_of(output))]
    head, *rest = parts
    return "\n\n".join([head, f"[This notebook as a file]({path.name})", *rest]) + "\n"


def output_of(output: dict[str, Any]) -> str:
    """What a cell showed, as the richest of pictures, tables and text; what libraries write to stderr is left out."""
    if output.get("name") == "stderr":
        return ""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).strip()
        return f'<div class="output"><img alt="What the cell draws" src="data:image/png;base64,{picture}"></div>'
    if "text/html" in data:
        # No blank line, which would end the block.
        table = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))
        return f'<div class="output">{table}</div>'
    text = "".join(data.get("text/plain", output.get("text", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def options() -> str:
    """Every command with its arguments, options and defaults."""
    import typer

    # The commands are those of this checkout.
    sys.path.insert(0, str(ROOT))
    import align.cli
    import evaluate.cli
    import featstore.cli

    parts = []
    for tool, app in (("featstore", featstore.cli.app), ("align", align.cli.app), ("evaluate", evaluate.cli.app)):
        for name, command in typer.main.get_command(app).commands.items():
            parts.append(f"## {tool} {name}\n\n{prose(command.help or '')}\n")
            panels: dict[str, list[str]] = {}
            for parameter in command.params:
                if parameter.hidden or parameter.name == "help":
                    continue
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(row(parameter))
            for panel, rows in panels.items():
                title = f"**{panel}**\n\n" if panel else ""
                parts.append(f"{title}| option | meaning | default |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def row(parameter: Any) -> str:
    names = parameter.opts if parameter.param_type_name == "option" else [(parameter.name or "").upper()]
    spelled = ", ".join(f"`{name}`" for name in [*names, *parameter.secondary_opts])
    default = "required" if parameter.required else ""
    if not parameter.required and parameter.show_default:
        value = getattr(parameter.default, "value", parameter.default)
        if parameter.secondary_opts:
            default = f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
        elif value is not None and value is not False and value not in ((), []):
            default = f"`{value}`"
    return f"| {spelled} | {prose(parameter.help or '').replace('|', '&#124;')} | {default} |"


def prose(text: str) -> str:
    """A help text as Markdown: nothing in it is markup."""
    text = text.replace("\\[", "[")  # as rich reads it
    lines = " ".join(text.replace("\n\n", "\0").split()).replace("\0", "\n\n")
    return re.sub(r"([\\<>*_\[\]{}#])", lambda found: f"&#{ord(found[0])};", lines)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
