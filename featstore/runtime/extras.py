"""The extras of this distribution: which one brings a library, and the error of a library that is not installed.

The distribution by itself reads stores. What more is needed is imported where it is needed, and a library that is then
missing becomes a :class:`~featstore.errors.MissingPackageError` that names the extra to install.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from featstore.errors import FeatstoreWarning, MissingPackageError

#: The distribution whose extras these are.
DISTRIBUTION = "featstore"

#: What each extra brings, by the names that are imported here: of its own, and through its libraries.
LIBRARIES = {
    "align": (
        "array_api_compat",
        "pydantic",
        "pydantic_core",
        "safetensors",
        "scipy",
        "sklearn",
        "tensorboardX",
        "yaml",
    ),
    "models": (
        "accelerate",
        "blake3",
        "datasets",
        "gguf",
        "google",
        "huggingface_hub",
        "pydantic",
        "pydantic_core",
        "regex",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "torch",
        "transformers",
        "triton",
    ),
    "page": ("jinja2", "markupsafe", "matplotlib", "pandas"),
    "cloud": ("dask", "distributed", "obstore"),
    "peft": ("peft",),
}
#: Extras that bring others along.
INCLUDES = {"evaluate": ("align", "models"), "page": ("align",)}


def extra_of(library: str, near: str | None = None) -> str | None:
    """The extra that brings a library; None for a library of no extra.

    Args:
        library: Import name.
        near: The extra that whatever needs the library is of: named where it brings the library itself or through
            another, so that one installation brings all that will be missing next.
    """
    for extra in () if near is None else (near, *INCLUDES.get(near, ())):
        if library in LIBRARIES.get(extra, ()):
            return near
    return next((extra for extra, libraries in LIBRARIES.items() if library in libraries), None)


def install_words(library: str, near: str | None = None) -> str:
    """The command that installs a library, as a message shows it.

    Args:
        library: Import name; one of no extra is a distribution of its own.
        near: As :func:`extra_of` takes it.
    """
    extra = extra_of(library, near)
    return f"pip install {library}" if extra is None else f"pip install '{DISTRIBUTION}[{extra}]'"


def installed(*libraries: str) -> bool:
    """Whether libraries can be imported; none of them is.

    Args:
        *libraries: Import names.
    """
    return all(find_spec(name) is not None for name in libraries)


def require(*libraries: str) -> None:
    """Refuse to begin what would need a library in the end.

    Args:
        *libraries: Import names.

    Raises:
        MissingPackageError: One of them is not installed.
    """
    for name in libraries:
        if not installed(name):
            raise _missing(name, None)


@contextmanager
def extras_named(near: str | None = None) -> Iterator[None]:
    """Turn the import of a library that is not installed into an error that names its extra. A decorator as well.

    Args:
        near: As :func:`extra_of` takes it.

    Raises:
        MissingPackageError: An import inside failed for a library of an extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if extra_of(library) is None or installed(library):
            raise
        raise _missing(library, near) from error


def _missing(library: str, near: str | None) -> MissingPackageError:
    return MissingPackageError(
        f"{library} is needed here and not installed: {install_words(library, near)}", name=library
    )


def drawn(what: str, *libraries: str) -> bool:
    """Whether pages and pictures beside a result can be made; a warning says how, where they cannot.

    What was measured is written in any case: an hour of work does not end in an error for want of a picture.

    Args:
        what: What is left out otherwise, for the warning: "the page and the pictures".
        *libraries: Import names of what draws it.
    """
    missing = next((name for name in libraries if not installed(name)), None)
    if missing is None:
        return True
    warnings.warn(f"without {missing}, {what} are left out: {install_words(missing)}", FeatstoreWarning, stacklevel=2)
    return False
