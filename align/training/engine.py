"""One optimiser step after another: accelerate, AdamW, the schedule, and the running average of the weights.

A step consumes the *global* micro-batches it is given, whoever holds them: with W processes each takes every W-th, and
the loss of a micro-batch counts by its share of the step's rows. So one process with four micro-batches a step, two
with two each and four with one each take the same step, up to rounding.

Figures stay on the device until somebody asks: reading them after every step would make the host wait for the device
each time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, broadcast
from torch import Tensor

from align.training import losses
from align.training.checkpoint import Arrays
from align.training.feed import Rows
from align.training.modules import TrainedMap
from align.training.plan import LOSSES, PRECISIONS, Placement
from featstore.errors import SpecError

#: AdamW's second beta; the first follows the schedule.
_BETA2 = 0.99


def precision_of(place: Placement) -> str:
    """``float32`` or ``bfloat16``: what the arithmetic between float32 weights and float32 losses is done in.

    Args:
        place: ``auto`` means bfloat16 on a CUDA device that has it.

    Raises:
        SpecError: Unknown precision.
    """
    if place.precision not in PRECISIONS:
        raise SpecError(f"--precision {place.precision!r}: choose one of {', '.join(PRECISIONS)}")
    if place.precision != "auto":
        return place.precision
    cuda = torch.device(place.device).type == "cuda"
    return "bfloat16" if cuda and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def accelerator_for(place: Placement) -> Accelerator:
    """accelerate, for the device and precision of a training; joins the other processes where there are some.

    Args:
        place: Device and precision.

    Raises:
        SpecError: The device is not there, or accelerate was told to use another one.
    """
    device, precision = torch.device(place.device), precision_of(place)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SpecError(f"--device {place.device}: torch sees no CUDA device here; use --device cpu")
        if device.index is not None:
            torch.cuda.set_device(device)
    # accelerate keeps one precision for the whole process; two trainings in it may differ.
    AcceleratorState._reset_state(False)  # noqa: SLF001 - there is no public way
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        # Given, or the launcher's environment would divide our losses a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Means, skip and preconditioner never change: sending them at every step would cost more than the gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.device.type != device.type:
        raise SpecError(
            f"--device {place.device}: accelerate was started for {accelerator.device.type}; use one device for both"
        )
    return accelerator


def one_cycle(step: int, steps: int, peak: float) -> tuple[float, float]:
    """Learning rate and momentum of a step: a short warm-up, then a cosine to nearly nothing (Smith and Topin 2018).

    The figures are those of :class:`torch.optim.lr_scheduler.OneCycleLR` with ``total_steps = steps + 1`` and a warm-up
    of a tenth of the steps, 10 at most, as a function of the step alone: nothing to save, nothing to restore.

    Args:
        step: From 0.
        steps: How many there will be, at least 1.
        peak: Highest learning rate.

    Returns:
        ``(lr, beta1)``.
    """
    warm = min(0.1, 10 / steps) * (steps + 1) - 1
    if warm > 0 and step <= warm:
        turn, low = step / warm, peak / 25
        share = (1 + math.cos(math.pi * turn)) / 2
        return peak + (low - peak) * share, 0.85 + 0.1 * share
    turn = (step - warm) / (steps - warm)
    share = (1 + math.cos(math.pi * turn)) / 2
    low = peak / 25e4
    return low + (peak - low) * share, 0.95 - 0.1 * share


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        weights: By component, from :func:`align.training.plan.parse_loss`.
        centre: (dy,) float32, the target's train mean, on the device.
        unit: Of the MSE.
        temperature: Of InfoNCE.
    """

    weights: dict[str, float]
    centre: Tensor
    unit: float
    temperature: float

    @property
    def names(self) -> tuple[str, ...]:
        """The figures of a step, in order."""
        parts = [name for name in LOSSES if self.weights[name] > 0]
        return ("total", *parts, *(["infonce_top1"] if "infonce" in parts else []))

    def __call__(self, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and all figures of :attr:`names` as one detached tensor.

        Args:
            y_hat: (B, dy) predictions.
            y: (B, dy) targets.
        """
        total, parts = losses.combined(
            y_hat, y, self.weights, centre=self.centre, temperature=self.temperature, unit=self.unit
        )
        return total, torch.stack([total.detach(), *(parts[name] for name in self.names[1:])])


class Engine:
    """A map, its optimiser and the average of its weights.

    Args:
        accelerator: From :func:`accelerator_for`.
        module: The map, on the accelerator's device.
        objective: What is minimised.
        lr: Peak learning rate.
        clip: Largest norm of a gradient.
        steps: How many there will be.
        averaging: Exponent of the polynomial-decay average (Shamir and Zhang 2013): after t steps it spans about the
            last ``t / (averaging + 1)``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: TrainedMap,
        objective: Objective,
        *,
        lr: float,
        clip: float,
        steps: int,
        averaging: float,
    ) -> None:
        self.accelerator, self.objective = accelerator, objective
        self.module = module
        # Only the weights are averaged; means, skip and preconditioner are shared.
        self.average = copy.deepcopy(module, {id(buffer): buffer for buffer in module.buffers()})
        self.average.requires_grad_(requires_grad=False)
        self.taken = 0
        self._peak, self._clip, self._steps, self._averaging = lr, clip, steps, averaging
        self._names = [name for name, _ in module.named_parameters()]
        self._weights, self._means = list(module.parameters()), list(self.average.parameters())
        self._optimiser = torch.optim.AdamW(self._weights, lr=lr, weight_decay=0.0, fused=True)
        # Wraps for several processes and for mixed precision; one process in float32 gets the module back.
        self._model = accelerator.prepare_model(module)
        self._lines: list[Tensor] = []
        self._norms: list[Tensor] = []

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return one_cycle(self.taken, self._steps, self._peak)[0]

    @property
    def unread(self) -> int:
        """Steps whose figures were not read yet."""
        return len(self._lines)

    def step(self, own: Iterator[Rows], count: int, rows: int) -> None:
        """Take one step.

        Args:
            own: This process's micro-batches.
            count: How many of them belong to this step; may be 0 in an epoch's last.
            rows: Rows of the step on all processes together.
        """
        line: Tensor | None = None
        for i in range(count):
            x, y = next(own)
            # Processes exchange gradients once a step.
            with nullcontext() if i == count - 1 else self.accelerator.no_sync(self._model):
                total, figures = self.objective(self._model(x), y)
                share = len(x) / rows
                # Gradients of several processes are averaged, not summed.
                factor = share * self.accelerator.num_processes
                # Not through accelerate, which would divide by its own number of micro-batches: one more operation each
                # way, and the losses are weighted already.
                (total if factor == 1 else total * factor).backward()
            if share != 1:
                figures = figures * share
            line = figures if line is None else line + figures
        if line is None:
            # The others wait for this process's gradients, too.
            nothing = self._model(self.module.mean_source[None]).sum() * 0.0
            nothing.backward()
            line = torch.zeros(len(self.objective.names), device=self.accelerator.device)
        self._lines.append(line)
        self._norms.append(torch.nn.utils.clip_grad_norm_(self._weights, self._clip, foreach=True))
        lr, beta = one_cycle(self.taken, self._steps, self._peak)
        for group in self._optimiser.param_groups:
            group["lr"], group["betas"] = lr, (beta, _BETA2)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.taken += 1
        with torch.no_grad():
            share = (self._averaging + 1) / (self._averaging + self.taken)
            torch._foreach_lerp_(self._means, self._weights, share)

    def read(self) -> list[list[float]]:
        """The figures of every step since the last call: those of the objective, and the gradient's norm."""
        if not self._lines:
            return []
        lines = self.accelerator.reduce(torch.stack(self._lines), reduction="sum")
        both = torch.cat([lines, torch.stack(self._norms)[:, None]], dim=1)
        self._lines, self._norms = [], []
        read: list[list[float]] = both.tolist()
        return read

    def sound(self) -> bool:
        """Whether all weights, and so their average, are finite."""
        return all(bool(torch.isfinite(mean.sum())) for mean in self._means)

    def tell(self, value: float) -> float:
        """The main process's value, on all of them.

        Args:
            value: What the main process knows.
        """
        if self.accelerator.num_processes == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(broadcast(told, from_process=0))

    def state(self) -> Arrays:
        """Copies of all that the next step depends on but :attr:`taken`: weights, their average, AdamW's moments."""
        held: dict[str, Tensor] = {}
        for name, weight, mean in zip(self._names, self._weights, self._means, strict=True):
            held |= {f"weight.{name}": weight.detach(), f"average.{name}": mean}
            held |= {f"adam.{name}.{key}": value for key, value in self._optimiser.state[weight].items()}
        return {name: tensor.to("cpu", copy=True).numpy() for name, tensor in held.items()}

    def restore(self, arrays: Arrays, taken: int) -> None:
        """Go on from a state.

        Args:
            arrays: From :meth:`state`.
            taken: Steps taken by then.
        """
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            for name, weight, mean in zip(self._names, self._weights, self._means, strict=True):
                prefix = f"adam.{name}."
                moments = {key: value for key, value in tensors.items() if key.startswith(prefix)}
                for key in (f"weight.{name}", f"average.{name}", *moments):
                    # Copying would spread a smaller tensor over a larger one; AdamW's step is a number.
                    if tensors[key].shape != (() if key == f"{prefix}step" else weight.shape):
                        raise ValueError(f"{key} is of shape {tuple(tensors[key].shape)}, not {tuple(weight.shape)}")
                weight.copy_(tensors[f"weight.{name}"])
                mean.copy_(tensors[f"average.{name}"])
                self._optimiser.state[weight] = {
                    key.removeprefix(prefix): value.to(weight.device, copy=True) for key, value in moments.items()
                }
        self.taken = taken
