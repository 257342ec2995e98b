"""What users are told of changes, and how the project is cited: both are files that tools read."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import jsonschema
import pytest
import yaml

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TYPES = [each["directory"] for each in PROJECT["tool"]["towncrier"]["type"]]
FRAGMENTS = sorted(path for path in (ROOT / "changes").iterdir() if path.name not in {"README.md", ".gitignore"})


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.name)
def test_a_fragment_has_a_name_that_is_read(path: object) -> None:
    parts = path.name.split(".")
    assert path.name.startswith("+"), "write +WORDS.TYPE.md; changes/README.md says how"
    assert len(parts) == 3, "write +WORDS.TYPE.md; changes/README.md says how"
    assert parts[1] in TYPES, f"its type is one of {', '.join(TYPES)}"
    assert path.read_text().strip()[:1] not in {"-", "*", ""}, "a sentence without a bullet"


def test_fragments_make_a_section() -> None:
    words = ["build", "--draft", "--version", "9.9.9", "--date", "2100-01-01"]
    done = subprocess.run(
        [sys.executable, "-m", "towncrier", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## 9.9.9 (2100-01-01)")
    shown = " ".join(done.stdout.split())
    for path in FRAGMENTS:
        assert " ".join(path.read_text().split()) in shown, path.name


def test_the_changelog_has_the_place_where_sections_go() -> None:
    assert (ROOT / "CHANGELOG.md").read_text().count("<!-- towncrier release notes start -->\n") == 1


def test_the_citation_is_valid_and_of_this_version() -> None:
    """By the schema of the Citation File Format 1.2.0 (CC BY 4.0), as cffconvert 2.0.0 carries it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    schema = json.loads((ROOT / "tests" / "support" / "cff" / "schema-1.2.0.json").read_text())
    jsonschema.Draft7Validator(schema).validate(citation)
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
