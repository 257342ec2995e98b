"""What the models of an extraction are found to be, by running them, before anything is written.

A configuration only claims how many blocks a model has and how wide its stream is. The verdict on a model is looked up
by its weights; where there is none, the model is loaded once for its tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from featstore.extraction.compute import Compute
from featstore.extraction.recorded import Recorded
from featstore.models import loading as models
from featstore.models.probe.prove import Proven, probe_key, prove, recalled
from featstore.models.probe.refusals import refuse_storing
from featstore.models.verdict import Verdict
from featstore.models.weights import weights_fingerprint
from featstore.runtime.console import err


def measured(info: models.ModelInfo, verdict: Verdict | None) -> models.ModelInfo:
    """What is known of a model, with what was measured in the place of what its configuration claims.

    Args:
        info: From its configuration.
        verdict: On the model, or None.
    """
    return info if verdict is None else replace(info, depth=verdict.blocks, width=verdict.width)


def verdicts(
    infos: Mapping[str, models.ModelInfo],
    compute: Compute,
    recorded: Recorded | None,
    *,
    table: bool,
    quiet: bool,
    load: bool = True,
) -> dict[str, Verdict]:
    """The verdict on every model: the store's, one that was found before, or a fresh one.

    Args:
        infos: Models by name.
        compute: How they are run.
        recorded: What the store says about itself.
        table: Whether layer 0 is to be a table.
        quiet: Do not say that a model is being tested.
        load: Load models on which there is no verdict even if that means to download them; without it such models are
            left out.

    Raises:
        ModelLoadError: A model cannot be loaded, or its forward pass raises.
        UnsupportedArchitectureError: A model has no residual stream that can be cut into token states.
        ProbeError: A model's rows would not be what they are taken for.
    """
    found = {}
    for name, info in infos.items():
        held = recorded.verified(name) if recorded else None
        if held is None and recorded is not None and recorded.complete and recorded.begun(name):
            continue  # a store from before there were verdicts; the model is tested when it is loaded
        verdict = held or _known(info, compute, name)
        if verdict is None and (load or models.weight_bytes(info.spec) is not None):
            if not quiet:
                err.print(f"testing {name} ({info.spec.ref}){info.peculiarities}")
            verdict = tested(info, compute, name, device=compute.device).verdict
        if verdict is None:
            continue
        refuse_storing(name, verdict, table=table)
        if verdict.left_out and held is None and not quiet:
            err.print(f"{name} is read without its {verdict.left_out}")
        found[name] = verdict.for_storing()
        reading = verdict.reading
        if reading is not None and reading.causal is False and held is None and not quiet:
            err.print(
                f"note: {name} reads ahead: its states know the whole of their window. They are stored window by "
                "window, and cannot be injected"
            )
    return found


def tested(info: models.ModelInfo, compute: Compute, name: str, *, device: str) -> Proven:
    """A loaded model with the tests that storing its states needs.

    Args:
        info: The model.
        compute: How it is run.
        name: Its name in the store.
        device: Where it is run by this process.

    Raises:
        ModelLoadError: It cannot be loaded, or its forward pass raises.
        UnsupportedArchitectureError: It has no residual stream that can be cut into token states.
        NonFiniteStateError: It gives NaN or infinity on ordinary tokens.
    """
    model = models.load_model(
        info.spec,
        device=device,
        dtype=compute.dtype,
        attention=compute.attention[name],
        device_map=compute.device_map,
    )
    return prove(model, key=key(info, compute, name), name=name)


def key(info: models.ModelInfo, compute: Compute, name: str) -> str | None:
    """What a model and how it is run is known by, or None while its weights are not on this disk.

    Args:
        info: The model.
        compute: How it is run.
        name: Its name in the store.
    """
    weights = weights_fingerprint(info.spec, quiet=True)
    return weights and probe_key(
        weights=weights,
        config=info.config_hash,
        device=compute.placement(name).device.type,
        dtype=str(compute.dtype_of(name)).removeprefix("torch."),
        attention=compute.attention[name],
    )


def _known(info: models.ModelInfo, compute: Compute, name: str) -> Verdict | None:
    held = key(info, compute, name)
    verdict = recalled(held) if held else None
    return verdict if verdict is not None and verdict.reading is not None else None
