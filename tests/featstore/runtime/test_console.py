"""What every command shares; what users see of it is tested in `tests/whole/test_cli.py`."""

from __future__ import annotations

from importlib import metadata

import pytest
import typer

from featstore.runtime.console import add_version, run_app


def command() -> typer.Typer:
    app = typer.Typer(add_completion=False, no_args_is_help=True)
    add_version(app, "tool")

    @app.command()
    def work(amount: int = 1) -> None:
        typer.echo(f"worked {amount}")

    return app


@pytest.mark.parametrize("rest", [[], ["work"], ["no-such-command"]])
def test_the_version_is_one_line_whatever_follows(rest, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tool", "--version", *rest])
    run_app(command(), "tool")
    assert capsys.readouterr() == (f"tool {metadata.version('featstore')}\n", "")


def test_without_it_the_commands_do_their_work(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tool", "work", "--amount", "3"])
    run_app(command(), "tool")
    assert capsys.readouterr() == ("worked 3\n", "")


def test_featstore_says_its_version(run_cli):
    done = run_cli("featstore", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"featstore {metadata.version('featstore')}\n", "")
