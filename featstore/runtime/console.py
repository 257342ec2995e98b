"""What the three command-line tools share: progress on stderr, JSON on stdout, errors as one line.

The rule for every command: results go to stdout, everything else to stderr; with ``--json`` stdout carries exactly one
JSON object. Exit codes: 0 done, 1 a check found damage, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from featstore.errors import FeatstoreError, FeatstoreWarning, SpecError
from featstore.runtime.extras import DISTRIBUTION, extras_named
from featstore.runtime.visible import encodable, inline, visible
from featstore.runtime.writing import probe_folder, remedy_of


class _Messages(Console):
    """Messages of a line each: names, references and texts in them come from files, and none of that is markup."""

    def print(self, *objects: Any, **keywords: Any) -> None:
        """Print as ``rich.console.Console`` does, with what would steer a terminal, or begin a line, written out.

        Args:
            objects: Text, or anything that rich draws.
            keywords: Those of rich.
        """
        super().print(*(inline(each) if isinstance(each, str) else each for each in objects), **keywords)


err = _Messages(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
out = Console(highlight=False, markup=False, emoji=False)

#: Called as ``tick(done_since_last_call)`` by long loops; see :func:`progress`.
Tick = Callable[[float], None]

#: Words that a reader looks for, where a line begins with them.
STYLES = {"damaged": "bold red", "ok": "green", "bad": "bold red"}

_PLAIN_INTERVAL_S = 10.0
_INTERRUPTED = 130
#: Characters that an error shows of a path that is too long to be one.
_SHOWN = 60

#: What typer raises for words that do not parse. Its versions differ in whose class that is, click's or a copy in typer
#: itself; both are the parent of the one it exports.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def human(value: float) -> str:
    """Format a count for people: 1234567 -> ``1.23 M``.

    Args:
        value: Any finite number.
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g} {unit}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def human_bytes(value: float) -> str:
    """Format a size in decimal units, the ones disks are sold in.

    Args:
        value: Bytes.
    """
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def human_seconds(value: float) -> str:
    """Format a duration: 3725 -> ``1 h 02 min``.

    Args:
        value: Seconds.
    """
    if value < 100:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class _RateColumn(ProgressColumn):
    """Items a second in the unit of the task."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "it")
        return Text(f"{human(speed)} {unit}/s" if speed else f"- {unit}/s")


@contextmanager
def progress(label: str, total: float | None, unit: str, *, quiet: bool = False) -> Iterator[Tick]:
    """Show progress with rate and remaining time on stderr.

    On a terminal this is a bar; elsewhere (logs, CI) a line at most every ten seconds, so that a log stays readable.

    Args:
        label: What is being done.
        total: How many units there are in all, None if nobody knows.
        unit: Name of the unit, for the rate.
        quiet: Show nothing.

    Yields:
        A function to call with the number of units done since the last call.
    """
    if quiet:
        yield lambda _: None
    elif err.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as bar:
            task = bar.add_task(inline(label), total=total, unit=unit)
            yield lambda done: bar.advance(task, done)
    else:
        with _plain_progress(label, total, unit) as tick:
            yield tick


@contextmanager
def _plain_progress(label: str, total: float | None, unit: str) -> Iterator[Tick]:
    start = last = time.monotonic()
    done = 0.0

    def tick(step: float) -> None:
        nonlocal done, last
        done += step
        now = time.monotonic()
        if now - last >= _PLAIN_INTERVAL_S:
            last = now
            rate = done / (now - start)
            left = human_seconds((total - done) / rate) if rate and total is not None else "unknown time"
            whole = f" of {human(total)}" if total is not None else ""
            err.print(f"{label}: {human(done)}{whole} {unit}, {human(rate)} {unit}/s, {left} left")

    yield tick
    seconds = time.monotonic() - start
    if seconds >= 2:
        rate = done / seconds
        err.print(f"{label}: {human(done)} {unit} in {human_seconds(seconds)} ({human(rate)} {unit}/s)")


def jsonable(value: Any) -> Any:
    """Convert to what strict JSON can carry: NaN and infinity become null, arrays lists, paths text.

    Args:
        value: Nested dicts and sequences of numbers, strings, numpy scalars and arrays, paths.
    """
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def emit(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a command's result on stdout: one JSON object, or the readable form.

    Args:
        result: The machine-readable result.
        text: The same for people, in lines; a line that begins with a word of :data:`STYLES` has it in colour.
        as_json: Which of the two to print.
    """
    if as_json:
        sys.stdout.write(encodable(json.dumps(jsonable(result), ensure_ascii=False, allow_nan=False)) + "\n")
        sys.stdout.flush()
    else:
        shown = Text(visible(text))
        for word, style in STYLES.items():
            shown.highlight_regex(rf"(?m)^{word}\b", style)
        out.print(shown, soft_wrap=True)


def check_directory(path: Path, typed: Path | None = None) -> None:
    """Refuse a place for results that cannot become a directory, before any work is done for it.

    Args:
        path: Directory that results will go to; need not exist.
        typed: What was typed after ``--out``, where that is not the directory itself.

    Raises:
        SpecError: A file stands there or on the way there, it cannot be written to, or no path can be so long.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is yet to be made, or a file is on the way, which is said below
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(
            f"--out {str(typed or path)[:_SHOWN]!r} cannot be written ({why}); choose another directory"
        ) from error
    # An absolute path ends at the root, which exists.
    found = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if not found.is_dir():
        where = "is a file" if found == (typed or path).absolute() else f"lies below a file, {found}"
        raise SpecError(f"--out {typed or path} {where}; choose another directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise SpecError(f"--out {typed or path}: no permission to write in {found}; choose another directory")
    try:
        probe_folder(found)
    except OSError as error:
        # Rights do not say everything: some places take no files, whoever asks.
        raise SpecError(
            f"--out {typed or path}: no file can be made in {found} ({error.strerror}); choose another directory"
        ) from error


def add_version(app: typer.Typer, name: str) -> None:
    """Give a command ``--version``: one line on stdout, name and installed version, and nothing else.

    Args:
        app: The application; may not have a callback of its own.
        name: The command's name.
    """

    def show(wanted: bool) -> None:
        if wanted:
            sys.stdout.write(f"{name} {metadata.version(DISTRIBUTION)}\n")
            raise typer.Exit

    # Not a string, as annotations of this module are: typer could not see `show` in it.
    option = Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=show, is_eager=True)
    ]

    def options(version: bool = False) -> None:
        del version  # all is done by the option's own callback

    options.__annotations__ = {"version": option, "return": None}
    app.callback()(options)


def run_app(app: typer.Typer, name: str, extra: str | None = None) -> None:
    """Run a typer application with this project's exit codes and one-line errors.

    A command without a subcommand shows its help and exits with code 2, as typer has it.

    Args:
        app: The application.
        name: The command's name, shown before an error.
        extra: The extra that brings what most of its subcommands need, for the error of a library that is missing.
    """
    _warn_in_lines(name)
    # Libraries announce retries and fallbacks; what went wrong reaches the user in our own line.
    for library in ("huggingface_hub", "transformers", "datasets", "distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        # Outside of its standalone mode typer raises what was wrong with the words instead of drawing a box about it,
        # and returns the code of `typer.Exit`. Ctrl-C is such a code, too.
        with extras_named(extra):
            code = app(prog_name=name, standalone_mode=False)
    except FeatstoreError as error:
        _fail(name, str(error))
    except _UsageError as error:
        _refuse(name, error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader of our output went away (`| head`), which is no error of ours; typer makes an exit of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        # The last resort: what was not asked before, or has changed since.
        remedy = remedy_of(error)
        if remedy is None:
            raise
        _fail(name, f"{error.filename or 'writing'}: {error.strerror}; {remedy}")
    if code == _INTERRUPTED:
        err.print(f"{name}: interrupted; what was committed so far is kept")
    if code:
        raise SystemExit(code)


def _warn_in_lines(name: str) -> None:
    """Let the command warn as it says what went wrong: in one line, once, without a place in the code."""
    others, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
        line = " ".join(str(message).split())
        if not issubclass(category, FeatstoreWarning):
            others(message, category, *more, **named)
        elif line not in said:
            said.add(line)
            sys.stderr.write(f"{name}: {visible(line)}\n")

    warnings.showwarning = show


def _refuse(name: str, error: Any) -> NoReturn:
    """Words that do not parse: say which, and where the right ones are listed."""
    if type(error).__name__ == "NoArgsIsHelpError":
        # Making the error has printed the help.
        raise SystemExit(2)
    message = error.format_message().rstrip(".")
    # Newer versions of typer say what is wrong with a value, but not the value; pydantic, which they ask, knows it.
    if hasattr(error.__cause__, "errors"):
        value = error.__cause__.errors()[0]["input"]
        message = message.replace("Invalid value", f"Invalid value {value!r}", 1)
    # An option that ends the line without its value comes without a context.
    spoken = [name, *(word for word in sys.argv[1:2] if not word.startswith("-"))]
    command = error.ctx.command_path if error.ctx is not None else " ".join(spoken)
    _fail(name, f"{message[:1].lower()}{message[1:]}; see `{command} --help`")


def _fail(name: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    sys.stderr.write(f"{name}: {visible(line)}\n")
    raise SystemExit(2)
