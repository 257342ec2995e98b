"""How transformers is called: where a reference lies, with what of it read first, and what its errors become.

``trust_remote_code`` is off in every call. A ``config.json`` is read before transformers makes anything of it, so that
no name in it reaches code that would fetch or import something for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from featstore.errors import FeatstoreError, GatedModelError, MissingPackageError, ModelLoadError
from featstore.models.attention import refuse_names
from featstore.models.references import ModelSpec, expanded

#: Set by those who want transformers to fetch compiled code from a hub; transformers' own switch, with its words.
_KERNELS = "USE_HUB_KERNELS"
_TRUE = ("1", "ON", "YES", "TRUE")
#: transformers' switch against asking a hub, in a thread of its own, to convert pickled weights.
_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


def who(spec: ModelSpec) -> str:
    """A model as messages name it.

    Args:
        spec: Name and reference.
    """
    return f"model {spec.name!r} ({spec.ref})"


def located(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for a reference.

    Args:
        spec: Name and reference.

    Raises:
        ModelLoadError: A path leads to nothing.
    """
    path = expanded(spec.ref)
    common: dict[str, Any] = {"trust_remote_code": False}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"model {spec.name!r}: no GGUF file at {spec.ref!r}; correct the path")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **common}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path), **common}
    if spec.ref.startswith((".", "/", "~")):
        raise ModelLoadError(
            f"model {spec.name!r}: no directory {spec.ref!r}; give a hub id, a directory or a .gguf file"
        )
    return {
        "pretrained_model_name_or_path": spec.ref,
        "revision": spec.revision or "main",
        **common,
    }


def read_config(spec: ModelSpec) -> Any:
    """A model's configuration, which asks for no implementation of attention or experts any more.

    Args:
        spec: Where the model is; not an adapter.

    Raises:
        AttentionError: It names an implementation that is not in the list.
    """
    from transformers import AutoConfig, PreTrainedConfig

    place = located(spec)
    if "gguf_file" not in place:
        document, _ = PreTrainedConfig.get_config_dict(**place)
        refuse_names(document, f"the config.json of {who(spec)}")
    config = AutoConfig.from_pretrained(**place)
    choose(config, None)
    return config


def choose(config: Any, attention: str | None) -> None:
    """Set which attention a configuration asks for, in all its parts, over whatever its file said.

    Args:
        config: Of transformers; is changed.
        attention: Implementation; None leaves the choice to each part of the model.
    """
    from transformers import PreTrainedConfig

    waiting, seen = [config], set()
    while waiting:
        at = waiting.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        at._attn_implementation = attention  # noqa: SLF001 - the public way of saying it is weaker than the file
        at._experts_implementation = None  # noqa: SLF001
        waiting += [value for value in vars(at).values() if isinstance(value, PreTrainedConfig)]


@contextmanager
def loading(spec: ModelSpec, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what transformers and the hub raise into one line about this model, but for some errors.

    Args:
        spec: Name and reference.
        but: Errors that are left as they are.
    """
    from huggingface_hub.errors import GatedRepoError
    from transformers.utils import logging

    _keep_kernels_out()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    # A table of what does not match comes before the line that says so.
    logging.set_verbosity_error()
    try:
        with _without_fetching():
            yield
    except Exception as error:
        if isinstance(error, (FeatstoreError, *but)):
            raise
        chain = list(_causes(error))
        name = who(spec)
        if any(isinstance(e, GatedRepoError) or "gated repo" in str(e).lower() for e in chain):
            raise GatedModelError(
                f"{name} is gated: accept its licence at https://huggingface.co/{spec.ref}, then run `hf auth login`"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"{name} cannot be loaded: {reason} Check the name with `featstore doctor`, the network (HF_HUB_OFFLINE), "
            "or give a local directory or GGUF file"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _keep_kernels_out() -> None:
    """Let transformers fetch no compiled code from a hub, now or in a later pass, unless its own switch is set.

    Attention whose package is missing, and some quantised layers, would come from there where `kernels` is installed.
    """
    from transformers.integrations import hub_kernels

    fetch = getattr(hub_kernels, "get_kernel_hub", None)
    if fetch is not None and not isinstance(fetch, _AskFirst):
        hub_kernels.get_kernel_hub = _AskFirst(fetch)


@contextmanager
def _without_fetching() -> Iterator[None]:
    """Keep transformers from asking a hub for what nobody named, while it loads.

    It would have pickled weights converted there, and some types look there for a kernel when they are imported.
    """
    before = os.environ.get(_CONVERSION)
    os.environ[_CONVERSION] = "1"
    library = sys.modules.get("kernels")
    fetch = getattr(library, "get_kernel", None)
    if fetch is not None:
        library.get_kernel = _AskFirst(fetch)  # type: ignore[union-attr]
    try:
        yield
    finally:
        if fetch is not None:
            library.get_kernel = fetch  # type: ignore[union-attr]
        if before is None:
            os.environ.pop(_CONVERSION, None)
        else:
            os.environ[_CONVERSION] = before


@dataclass(frozen=True)
class _AskFirst:
    """A function that fetches a kernel, where transformers' switch allows that.

    Attributes:
        fetch: Of the library `kernels`.
    """

    fetch: Callable[..., Any]

    def __call__(self, name: str, *args: Any, **keywords: Any) -> Any:
        """Fetch a kernel.

        Raises:
            MissingPackageError: The switch is not set.
        """
        if os.environ.get(_KERNELS, "").upper() not in _TRUE:
            raise MissingPackageError(
                f"transformers would fetch the kernel {name!r} from a hub and run it; install a package that has it, "
                f"or allow that with {_KERNELS}=YES in the environment"
            )
        return self.fetch(name, *args, **keywords)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
