"""Errors name what is wrong and what to do: every message has a part after the statement of the fault."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from featstore import errors
from tests.support import ROOT

TYPED = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
#: What is wrong, then after a semicolon, a colon or a full stop what follows from it.
SECOND_PART = re.compile(r"[;:.] ")
#: Another error's words with a remark, which have their own second part.
PASSED_ON = ("{error}",)


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every message of ours that stands where the error is raised, ``{...}`` for values."""
    for package in ("featstore", "align", "evaluate"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    kind = node.exc.func
                    if isinstance(kind, ast.Name) and kind.id in TYPED:
                        # Those of a contradiction are the file and then what is wrong.
                        texts = [text for text in map(text_of, node.exc.args) if text is not None]
                        if texts:
                            yield f"{path.relative_to(ROOT)}:{node.lineno}", texts[-1]


def text_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                 for part in node.values if isinstance(part, ast.Constant | ast.FormattedValue))  # fmt: skip
        return "".join(map(str, parts))
    return None


def test_every_message_goes_on_after_the_fault() -> None:
    found = list(messages())
    assert len(found) > 600
    assert [f"{place}: {text}" for place, text in found
            if not SECOND_PART.search(text) and not text.startswith(PASSED_ON)] == []  # fmt: skip


@pytest.mark.parametrize(
    ("text", "whole"),
    [("ranks must be positive, not {rank}", False), ("ranks must be positive, not {rank}; give one such as 16", True)],
)
def test_a_fault_alone_is_not_a_message(text: str, whole: bool) -> None:
    assert bool(SECOND_PART.search(text)) is whole
