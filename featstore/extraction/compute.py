"""How the models of an extraction are run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from featstore.models.devices import DeviceMap, Placement, place, resolve_dtype


@dataclass(frozen=True)
class Compute:
    """How models are run.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: ``auto`` or a number type.
        device_map: Where the modules of models go, instead of one device; None for the device.
        attention: transformers' attention implementation that each model runs, by name.
    """

    device: str
    dtype: str
    device_map: DeviceMap | None
    attention: dict[str, str]

    def placement(self, name: str) -> Placement:
        """Where a model goes.

        Args:
            name: Model.
        """
        return place(self.device, self.device_map, name)

    def dtype_of(self, name: str) -> torch.dtype:
        """The number type that a model computes in.

        Args:
            name: Model.
        """
        return resolve_dtype(self.dtype, self.placement(name).device)
