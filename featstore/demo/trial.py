"""The whole probe on one model whose weights lie on this disk: what it is right for, before anything is made."""

from __future__ import annotations

from typing import Any

import torch

from featstore.errors import FeatstoreError, SpecError
from featstore.models.devices import DeviceMap
from featstore.models.loading import ModelInfo, load_model
from featstore.models.probe.prove import everything, key_of, prove
from featstore.models.probe.words import lines
from featstore.models.stack import residual_stream
from featstore.models.verdict import Verdict
from featstore.models.weights import weights_fingerprint
from featstore.runtime.console import err, progress


def try_model(
    info: ModelInfo,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    device_map: DeviceMap | None = None,
    quiet: bool = False,
) -> Verdict:
    """Load a model and run every test on it, at every layer.

    Args:
        info: The model, whose weights lie on this disk.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: Compute dtype.
        attention: transformers' attention implementation.
        device_map: Where its modules go, instead of one device.
        quiet: No progress.

    Raises:
        FeatstoreError: The model cannot be loaded or read; one line says why.
    """
    spec = info.spec
    if not quiet:
        err.print(f"loading {spec.name} ({spec.ref}){info.peculiarities}")
    model = load_model(spec, device=device, dtype=dtype, attention=attention, device_map=device_map)
    key = key_of(model, weights=weights_fingerprint(spec, quiet=quiet), config=info.config_hash)
    needs = everything(residual_stream(model))
    with progress(f"test {spec.name}", needs.tests, "tests", quiet=quiet) as tick:
        return prove(model, needs, key=key, tick=tick).verdict


def trial(info: ModelInfo, **options: Any) -> dict[str, Any]:
    """Try a model and say what came out.

    Args:
        info: The model.
        options: Of :func:`try_model`.

    Returns:
        ``ok``, whether its states can be stored; ``lines`` for people; ``verified``, the verdict, None where there is
        none; and ``error``, one line, where there is none.

    Raises:
        SpecError: An option is unknown, or the model does not have it.
    """
    try:
        verdict = try_model(info, **options)
    except SpecError:
        raise  # wrong words for how to load it, and nothing about the model
    except FeatstoreError as error:
        return _failed(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        return _failed("the memory does not hold it; use --device-map auto, --dtype bfloat16, or --quick")
    return {"ok": True, "lines": lines(verdict), "verified": verdict.content(), "error": ""}


def _failed(why: str) -> dict[str, Any]:
    return {"ok": False, "lines": [], "verified": None, "error": " ".join(why.split())}
