"""The maps of a run, as functions of arrays."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from align.layers import LayerPair
from align.maps.fitted import Adapter, Aligner
from align.maps.registry import formula, resolve
from featstore.errors import AdapterError, UnknownMapError
from featstore.runtime.records import frame
from featstore.runtime.sheets import Sheet, counted

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.console import RenderableType

#: A numpy array or a torch tensor; what comes back is of the same kind.
Rows = TypeVar("Rows", NDArray[Any], "torch.Tensor")


class Map:
    """A fitted map from one layer's states to another's.

    Attributes:
        aligner: The map as it is stored.
    """

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner
        # Tensors that were moved to a device, by its name.
        self._moved: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def pair(self) -> LayerPair:
        """Which layers."""
        return self.aligner.pair

    @property
    def key(self) -> str:
        """Its name in the run, such as ``llama:16->mistral:16``."""
        return self.pair.key

    @property
    def kind(self) -> str:
        """Formula: ``linear`` (one matrix between two means), ``mlp``, or ``compress``, which reads windows."""
        return self.aligner.kind

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen when it was fitted: strength, rank and so on."""
        return dict(self.aligner.options)

    @property
    def widths(self) -> tuple[int, int]:
        """Width of the states it takes, of a joint map all of its layers together, and of those it gives."""
        return self.aligner.widths

    @property
    def weight(self) -> NDArray[np.float32]:
        """(d_source, d_target): ``x @ weight + bias`` is the map.

        Raises:
            AdapterError: The map is not linear.
        """
        return self._linear("weight")

    @property
    def bias(self) -> NDArray[np.float32]:
        """(d_target,): ``mean_target - mean_source @ weight``.

        Raises:
            AdapterError: The map is not linear.
        """
        shift = self._linear("mean_source").astype(np.float64) @ self.weight.astype(np.float64)
        return (self._linear("mean_target") - shift).astype(np.float32)

    @property
    def mean_source(self) -> NDArray[np.float32]:
        """(d_source,): what is subtracted from source states; zeros where the map is not centred.

        Raises:
            AdapterError: The map is not linear.
        """
        return self._linear("mean_source")

    @property
    def mean_target(self) -> NDArray[np.float32]:
        """(d_target,): what is added to mapped states; zeros where the map is not centred.

        Raises:
            AdapterError: The map is not linear.
        """
        return self._linear("mean_target")

    def transform(self, x: Rows) -> Rows:
        """Map source states.

        The arithmetic is float32, whatever the states are. A tensor is mapped on its device, and gradients flow through
        to it. States that are not finite give mapped states that are not finite.

        Args:
            x: Real numbers ``(..., d_source)``, numpy or torch; usually ``(n, d_source)``. Of a joint map, the states
                of its layers end to end in the order of its key.

        Returns:
            float32 ``(..., d_target)``, an array or a tensor as ``x`` is.

        Raises:
            AdapterError: The states have another width or are no real numbers, the map reads windows, or gradients are
                wanted through a map that is written for arrays alone.
        """
        if not self.aligner.takes_rows:
            raise AdapterError(
                f"{self.key} is a {self.kind} map: it reads whole windows, and single states cannot be put through it; "
                "use `evaluate stitch` or `evaluate.stitch` on the run, or a run of another type"
            )
        if type(x).__module__.partition(".")[0] == "torch":
            mapped: Rows = self._of_tensor(x)
            return mapped
        try:
            states = np.asarray(x)
        except ValueError as error:
            raise AdapterError(
                f"{self.key} maps an array of real numbers, and this is none ({error})"
                "; give states of shape (n, d_source)"
            ) from error
        if states.dtype.kind not in "fiu":
            raise AdapterError(f"{self.key} maps real numbers, not {states.dtype}; give float32 states")
        self._check_width(states.shape)
        rows = states.reshape(-1, states.shape[-1]).astype(np.float32, copy=False)
        return self.aligner.apply(rows).reshape(*states.shape[:-1], self.widths[1])

    def __repr__(self) -> str:
        """One line."""
        source, target = self.widths
        return f"<Map {self.key}: {self.kind}, {source} to {target} dimensions>"

    def _linear(self, name: str) -> NDArray[np.float32]:
        if self.kind != "linear":
            raise AdapterError(f"{self.key} is a {self.kind} map, which is no single matrix; use transform")
        return self.aligner.tensors[name]

    def _check_width(self, shape: tuple[int, ...]) -> None:
        width = self.widths[0]
        if not shape or shape[-1] != width:
            given = f"states of width {shape[-1]}" if shape else "a single number"
            raise AdapterError(
                f"{self.key} takes states of width {width}, not {given}; give the residual stream of {self._read()}"
            )

    def _read(self) -> str:
        layers = ", ".join(map(str, self.pair.source_layers))
        several = len(self.pair.source_layers) > 1
        return f"{self.pair.source} at layer{'s' * several} {layers}{', end to end' * several}"

    def _of_tensor(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if x.dtype.is_complex or x.dtype == torch.bool:
            raise AdapterError(f"{self.key} maps real numbers, not {x.dtype}; give float32 states")
        if x.layout is not torch.strided or x.is_meta:
            raise AdapterError(
                f"{self.key} maps dense tensors with values, not {x.layout} on {x.device}; use to_dense()"
            )
        self._check_width(tuple(x.shape))
        on_tensors = formula(self.kind).on_tensors
        if on_tensors is None:
            if x.requires_grad and torch.is_grad_enabled():
                raise AdapterError(
                    f"{self.key} is a {self.kind} map, which is written for arrays alone: no gradient flows through "
                    "it; give states without one, x.detach()"
                )
            rows = x.detach().reshape(-1, x.shape[-1]).to(device="cpu", dtype=torch.float32).numpy()
            return torch.from_numpy(self.aligner.apply(rows)).to(x.device).reshape(*x.shape[:-1], self.widths[1])
        tensors = self._on(x.device)
        # Inside of somebody's autocast products would be bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            mapped: torch.Tensor = resolve(on_tensors)(tensors, x.to(torch.float32))
        return mapped

    def _on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The map's tensors on a device, moved once."""
        import torch

        place = str(device)
        if place not in self._moved:
            self._moved[place] = {name: torch.tensor(t, device=device) for name, t in self.aligner.tensors.items()}
        return self._moved[place]


class Maps(Mapping[str, Map]):
    """The maps of a run by key, such as ``llama:16->mistral:16``.

    Attributes:
        path: Run directory.
        card: What ``adapter.json`` says of models, store and corpus.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.path: Path = adapter.directory
        self.card: dict[str, Any] = adapter.card
        self._maps = {key: Map(aligner) for key, aligner in adapter.aligners.items()}

    @property
    def type(self) -> str:
        """The run's type of map, such as ``procrustes``."""
        return str(self.card["type"])

    def __getitem__(self, key: str) -> Map:
        """A map by its key.

        Args:
            key: Source and target layer.

        Raises:
            UnknownMapError: The run has no such map; the message lists its keys, the nearest first.
        """
        try:
            return self._maps[key]
        except (KeyError, TypeError):
            near = difflib.get_close_matches(str(key), self._maps, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}? It has" if near else "it has"
            raise UnknownMapError(
                f"no map {key!r} in {str(self.path)!r}; {hint} {', '.join(map(repr, self._maps))}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def to_pandas(self) -> pd.DataFrame:
        """One row for every map: its key, kind, models, layers, widths and numbers of parameters."""
        rows = []
        for key, each in self._maps.items():
            card = each.aligner.card()
            rows.append(
                {
                    "pair": key,
                    "type": self.type,
                    "kind": each.kind,
                    "source": each.pair.source,
                    "source_layers": "+".join(map(str, each.pair.source_layers)),
                    "target": each.pair.target,
                    "target_layer": each.pair.target_layer,
                    "source_width": each.widths[0],
                    "target_width": each.widths[1],
                    **card["parameters"],
                }
            )
        return frame(rows)

    def __rich__(self) -> RenderableType:
        """The maps for a terminal."""
        return self._sheet().__rich__()

    def __repr__(self) -> str:
        """One line."""
        return f"<Maps {str(self.path)!r}: {self.type}, {', '.join(self._maps)}>"

    def _repr_html_(self) -> str:
        return self._sheet().html()

    def _sheet(self) -> Sheet:
        rows = []
        for key, each in self._maps.items():
            parameters = each.aligner.card()["parameters"]
            rows.append((key, each.kind, *map(str, each.widths), str(parameters["shipped"])))
        title = f"{self.type}: {counted(len(self), 'map')} in {self.path}"
        return Sheet(title, ("map", "kind", "from width", "to width", "numbers"), tuple(rows))
