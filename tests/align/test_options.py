"""Options declared beside the fields: their validation, and the commands that take them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib import metadata
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from align.cli import sweep, train
from align.options import NOT_NEGATIVE, POSITIVE, POSITIVE_COUNT, check_values, declared, flag, option, takes, values
from align.settings import LoopSettings, Settings
from featstore.errors import SpecError
from featstore.runtime.quantities import parse_bytes


@dataclass(frozen=True)
class Garden:
    """A settings class."""

    name: str
    trees: int = option(3, "How many trees.", range=POSITIVE_COUNT)
    slope: float | None = option(None, "Steepness.", range=POSITIVE)
    frost: float = option(0.0, "Worst frost.", range=NOT_NEGATIVE)
    soil: str = option("clay", "What it grows on.", choices=("clay", "sand"), panel="Below")
    fence: bool = option(False, "Put up a fence.")
    lit: bool = option(True, "Light it.")
    water: int = option(1 << 20, "Water.", typed="1MiB", parse=parse_bytes)
    kind: str = option("kitchen", "Kind of garden.", by_type=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trees": 0}, "--trees 0: must be at least 1"),
        ({"slope": 0.0}, "--slope 0.0: must be a positive number"),
        ({"slope": math.nan}, "--slope nan: must be a positive number"),
        ({"slope": math.inf}, "--slope inf: must be a positive number"),
        ({"frost": -1.0}, "--frost -1.0: must not be negative"),
        ({"soil": "peat"}, "--soil 'peat': choose one of clay, sand"),
    ],
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any], words: str) -> None:
    check_values(Garden("g"))
    check_values(Garden("g", slope=1e-9, frost=0.0, soil="sand"))
    with pytest.raises(SpecError) as caught:
        check_values(Garden("g", **changes))
    assert str(caught.value) == words


def run(*words: str) -> dict[str, Any]:
    """What a command with a garden's options is given."""
    app, seen = typer.Typer(), {}

    @app.command()
    @takes(Garden)
    def plant(name: str, *, loud: bool = False, **given: Any) -> None:
        """Plant."""
        seen.update(name=name, loud=loud, **given)

    done = CliRunner().invoke(app, list(words), catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return seen or {"help": done.output}


def test_a_command_takes_what_is_declared() -> None:
    assert run("here") == {
        "name": "here",
        "loud": False,
        "trees": 3,
        "slope": None,
        "frost": 0.0,
        "soil": "clay",
        "fence": False,
        "lit": True,
        "water": "1MiB",
        "kind": None,
    }
    given = run("here", "--trees", "5", "--fence", "--no-lit", "--slope", "0.5", "--water", "2KiB", "--loud")
    assert Garden("here", **values(Garden, given, {})) == Garden("here", 5, 0.5, 0.0, "clay", True, False, 2048)
    assert values(Garden, given, {"kind": "rose", "trees": 9}) == {**values(Garden, given, {}), "kind": "rose"}
    assert values(Garden, {"kind": "wild"}, {"kind": "rose"}) == {"kind": "wild"}


def test_the_help_says_what_is_declared() -> None:
    shown = run("--help")["help"]
    for words in (
        "How many trees.",
        "[default: 3]",
        "What it grows on. Choices: clay, sand.",
        "[x>=1]",
        "<float range> [x>0]",
        "Below",
        "[default: 1MiB]",
    ):
        assert words in shown
    assert "--no-lit" in shown
    assert "--no-fence" not in shown


@pytest.mark.parametrize("settings", [Settings, LoopSettings])
def test_every_field_is_an_option_of_train_with_its_default(settings: Any) -> None:
    own = signature(train).parameters
    for entry in fields(settings):
        if entry.name in ("store", "loop"):
            continue
        _, about = declared(settings)[entry.name]
        assert about.help.endswith("."), entry.name
        if about.typed is None and not about.by_type:
            assert own[entry.name].default == entry.default, entry.name
        assert all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in own.values())
    # What people type is what the field holds.
    assert parse_bytes(str(own["memory"].default)) == Settings("s").memory if settings is Settings else True


def test_a_sweep_shares_the_declarations() -> None:
    own, whole = signature(sweep).parameters, signature(train).parameters
    for name in ("source", "target", "both", "epochs", "seed"):
        assert own[name].default == whole[name].default
        assert own[name].annotation.__metadata__[0].help == whole[name].annotation.__metadata__[0].help


def test_an_option_as_it_is_typed() -> None:
    assert flag("cka_every") == "--cka-every"


def test_align_says_its_version(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("align", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"align {metadata.version('featstore')}\n", "")
