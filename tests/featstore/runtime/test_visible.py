"""Text out of files steers no terminal, forges no line, and always can be written."""

from __future__ import annotations

import json
import warnings

import pytest
import typer

from featstore.errors import FeatstoreWarning, SpecError
from featstore.runtime import console
from featstore.runtime.sheets import Sheet
from featstore.runtime.visible import encodable, inline, visible

#: A colour, a carriage return, a bell, a reversed reading order, half a character, and what rich takes for markup.
HOSTILE = "a\x1b[31mb\rc\x07d\u202ee\udc80f[bold]g[/m]:smile:"
SHOWN = r"a\x1b[31mb\x0dc\x07d\u202ee\udc80f[bold]g[/m]:smile:"


def test_what_steers_a_terminal_is_written_out():
    assert visible(HOSTILE) == SHOWN
    assert visible("line\n\tnext é 語 \u200d") == "line\n\tnext é 語 \u200d"
    assert inline("name\nno damage\t\u2028") == r"name\nno damage\t\u2028"
    assert inline(3) == "3"


def test_a_json_document_stays_the_same_document():
    values = [HOSTILE, "\x85\x9b é 語"]
    written = encodable(json.dumps(values, ensure_ascii=False))
    assert json.loads(written) == values
    assert not set(written) & set("\x1b\r\x07\u202e\udc80\x85\x9b")
    written.encode()


@pytest.mark.parametrize("as_json", [False, True])
def test_results_are_shown_as_they_are(as_json, capsys):
    console.emit({"name": HOSTILE}, f"damaged {HOSTILE}\nnext", as_json=as_json)
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown) == {"name": HOSTILE}
    else:
        assert shown == f"damaged {SHOWN}\nnext\n"


def test_messages_keep_to_their_line(capsys):
    console.err.print(f"loading m ({HOSTILE}\nm is whole)")
    assert capsys.readouterr().err == f"loading m ({SHOWN}\\nm is whole)\n"


def test_errors_and_warnings_do_too(monkeypatch, capsys):
    app = typer.Typer(add_completion=False)

    @app.command()
    def work() -> None:
        warnings.warn(HOSTILE, FeatstoreWarning, stacklevel=1)
        raise SpecError(HOSTILE)

    monkeypatch.setattr("sys.argv", ["tool"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit):
            console.run_app(app, "tool")
    # Blanks of any kind are one blank in a message.
    line = SHOWN.replace(r"\x0d", " ")
    assert capsys.readouterr().err == f"tool: {line}\n" * 2


def test_tables_do_too(capsys):
    console.out.print(Sheet(HOSTILE, ("a\nb", HOSTILE), (("x", HOSTILE),), (HOSTILE,)), width=200)
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 4
    assert r"a\nb" in shown
