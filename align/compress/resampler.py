"""The trained part: source states to latents by cross-attention, latents to target states by cross-attention.

A Perceiver-style bottleneck (Perceiver Resampler, Alayrac et al. 2022; Perceiver IO, Jaegle et al. 2021) made to learn
from some ten thousand tokens. There, every latent is a free query over all inputs, and which latent is about what has
to be learned; here :mod:`align.compress.layout` says it: the groups of latent m are its heads, a head attends to the
tokens of its group, and a target position attends to the groups about its own byte. What is left to learn is what to
send and how to read it.

With all residual branches at zero, where training starts, this is a linear codec: a token's leading principal
coordinates, averaged within its group, and the ridge map from there to the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from align.compress.layout import Layout
from align.compress.pack import BEFORE, NEIGHBOURS, Packed, pack
from featstore.errors import FitError

#: Sines and cosines of a byte offset; the longest period is ten thousand times 2 pi bytes (Vaswani et al. 2017).
SINUSOIDS = 32
#: Groups that one mixing layer sees, and tokens that the encoder does.
_REACH = 7
_DROPOUT = 0.25
#: An attention logit that the initial choice is ahead by.
_AHEAD = 4.0


def sinusoids(values: Tensor) -> Tensor:
    """Sinusoidal encoding of byte offsets.

    Args:
        values: (...) bytes.

    Returns:
        (..., SINUSOIDS).
    """
    steps = torch.arange(SINUSOIDS // 2, dtype=values.dtype, device=values.device)
    angles = values[..., None] * torch.exp(-math.log(10_000.0) * steps / (SINUSOIDS // 2))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class _Mixer(nn.Module):
    """A residual block over a sequence: neighbours by a depthwise convolution, the whole window by its mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.near = nn.Conv1d(width, width, _REACH, padding=_REACH // 2, groups=width)
        self.whole = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(_DROPOUT)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """(B, S, width), mask (B, S, 1) of ones and zeros."""
        z = self.first(h) * mask
        mean = z.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        near = self.near(z.transpose(1, 2)).transpose(1, 2)
        h = h + self.drop(self.mix(functional.gelu(near + self.whole(mean))))
        return h + self.drop(self.down(functional.gelu(self.up(self.second(h)))))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Resampler(nn.Module):
    """Source states of a window to M latents of R numbers, rounded to bfloat16, and from these to target states.

    Args:
        layout: How latents are used.
        basis: (d_source, n) principal directions over their scale: ``(x - mean_source) @ basis`` has variance about 1.
        mean_source: (d_source,) train mean.
        mean_target: (d_target,) train mean.
        readout: (K, d_target) map from a group's coordinates, with which training starts.
        unit: Root mean variance of the target.
        width: Of the hidden layers.
        depth: Mixing blocks of the decoder.
        seed: Of the initial weights.

    Raises:
        FitError: Shapes do not fit, or something is not finite.
    """

    basis: Tensor
    mean_source: Tensor
    mean_target: Tensor

    def __init__(
        self,
        layout: Layout,
        *,
        basis: NDArray[np.float32],
        mean_source: NDArray[np.float32],
        mean_target: NDArray[np.float32],
        readout: NDArray[np.float32],
        unit: float,
        width: int = 192,
        depth: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        k = layout.most_coordinates
        dx, dy = len(mean_source), len(mean_target)
        if basis.ndim != 2 or len(basis) != dx or readout.shape != (k, dy):
            raise FitError(
                f"basis {basis.shape} and readout {readout.shape} do not fit widths {dx} and {dy}, {k} sent"
                "; give the tensors of one map"
            )
        if not (math.isfinite(unit) and unit > 0):
            raise FitError(f"unit must be finite and positive, not {unit}: the target's train states do not vary")
        if width < 1 or depth < 0:
            raise FitError(f"width {width} and depth {depth}: use at least 1 and 0")
        self.layout, self.unit, self.width, self.depth, self.seed = layout, float(unit), width, depth, seed
        for name, value in (("basis", basis), ("mean_source", mean_source), ("mean_target", mean_target)):
            array = np.array(value, dtype=np.float32)
            if not np.isfinite(array).all():
                raise FitError(
                    f"{name} holds NaN or infinity; load the map again, or fit it with a smaller learning rate"
                )
            self.register_buffer(name, torch.from_numpy(array))
        n = basis.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.send = nn.Linear(n, k, bias=False)
            self.hear, self.hear_place = nn.Linear(n, width), nn.Linear(SINUSOIDS, width, bias=False)
            self.listen = _Mixer(width)
            self.send_more, self.weigh = _zero(nn.Linear(width, k)), _zero(nn.Linear(width, k))
            self.open = nn.Linear(k + 1 + SINUSOIDS, width)
            self.mixers = nn.ModuleList(_Mixer(width) for _ in range(depth))
            self.ask = nn.Linear(3 * SINUSOIDS, width)
            self.key, self.offset = nn.Linear(width, width), nn.Linear(SINUSOIDS, width)
            heads = max(h for h in (4, 2, 1) if width % h == 0)
            self.heads = heads
            # Every head starts at the group in which the position lies.
            start = torch.zeros(heads, NEIGHBOURS)
            start[:, BEFORE] = _AHEAD
            self.prior = nn.Parameter(start)
            self.norm = nn.LayerNorm(2 * width)
            self.up, self.down = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)
            self.read_more = _zero(nn.Linear(width, dy))
            self.read = nn.Linear(k, dy, bias=False)
            self.drop = nn.Dropout(_DROPOUT)
        with torch.no_grad():
            self.send.weight.copy_(torch.eye(k, n))
            self.read.weight.copy_(torch.from_numpy(np.asarray(readout, dtype=np.float32).T / self.unit))

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Coordinates of every group: with the group ends the whole content of the latents.

        Args:
            batch: Tensors named as in :class:`align.compress.pack.Packed`.

        Returns:
            (B, S, K), each rounded to bfloat16, zero where a group does not have the coordinate.
        """
        z = (batch["x"] - self.mean_source) @ self.basis * batch["tokens"][..., None]
        h = self.hear(z) + self.hear_place(sinusoids(batch["ends_x"]))
        h = self.listen(h, batch["tokens"][..., None].to(h.dtype))
        value = self.send(z) + self.send_more(h)
        member, has = batch["member"], batch["has"][..., None]
        weight = 8 * torch.tanh(self.weigh(h) / 8)  # bounded: no token is ever out of reach of the gradient
        if member.shape[2] == 1:
            pooled = _gather(value, member)[:, :, 0] * has[:, :, 0]
        else:
            logits = _gather(weight, member).masked_fill(~has, -1e9)
            pooled = (logits.softmax(dim=2) * _gather(value, member) * has).sum(dim=2)
        sent = pooled * batch["share"]
        # Rounded as they are sent; the gradient passes as if they were not.
        return sent + (sent.detach().to(torch.bfloat16).to(sent.dtype) - sent.detach())

    def decode(self, sent: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Target states from latents and the receiver's own byte ends.

        Args:
            sent: (B, S, K) from :meth:`encode`.
            batch: ``share``, ``ends``, ``groups``, ``ends_y``, ``before_y``, ``near`` and ``seen`` of
                :class:`align.compress.pack.Packed`.

        Returns:
            (B, U, d_target) in units of :attr:`unit` about the train mean; anything at padded positions.
        """
        mask, ends = batch["groups"][..., None].to(sent.dtype), batch["ends"]
        before = functional.pad(ends, (1, 0))[:, :-1]
        share = batch["share"].mean(dim=-1, keepdim=True)
        h = self.open(torch.cat((sent, share, sinusoids(ends - before)), dim=-1)) * mask
        for mixer in self.mixers:
            h = mixer(h, mask)
        h = h * mask
        near, seen = batch["near"], batch["seen"]
        own = near[..., BEFORE]
        linear = _gather(sent, own[..., None])[:, :, 0]
        places = batch["ends_y"]
        to_own = torch.gather(ends, 1, own) - places
        query = self.ask(torch.cat((sinusoids(places), sinusoids(places - batch["before_y"]), sinusoids(to_own)), -1))
        b, u, w = near.shape
        keys = _gather(self.key(h), near)
        gaps = torch.gather(ends, 1, near.reshape(b, -1)).view(b, u, w) - places[..., None]
        keys = (keys + self.offset(sinusoids(gaps))).view(b, u, w, self.heads, -1)
        scores = torch.einsum("buwhc,buhc->buhw", keys, query.view(b, u, self.heads, -1)) / math.sqrt(keys.shape[-1])
        scores = (scores + self.prior).masked_fill(~seen[:, :, None], -1e9)
        values = _gather(h, near).view(b, u, w, self.heads, -1)
        found = torch.einsum("buhw,buwhc->buhc", scores.softmax(dim=-1), values).reshape(b, u, -1)
        both = self.norm(torch.cat((found, query), dim=-1))
        more = found + self.drop(self.down(functional.gelu(self.up(both))))
        answer: Tensor = self.read(linear) + self.read_more(more)
        return answer

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """:meth:`encode`, then :meth:`decode`."""
        return self.decode(self.encode(batch), batch)

    @torch.no_grad()
    def reconstruct(
        self, x: NDArray[np.float32], ends_x: NDArray[np.integer[Any]], ends_y: NDArray[np.integer[Any]]
    ) -> NDArray[np.float32]:
        """The target states of one window, in evaluation mode.

        Args:
            x: float32 ``(T_x, d_source)``, ordinary source tokens in order.
            ends_x: int ``(T_x,)``, their byte ends within the window, non-decreasing.
            ends_y: int ``(T_y,)``, byte ends of the target's tokens, non-decreasing.

        Returns:
            float32 ``(T_y, d_target)``.

        Raises:
            FitError: There are no source tokens, or shapes do not fit.
        """
        dx, dy = self.basis.shape[0], len(self.mean_target)
        if x.ndim != 2 or x.shape[1] != dx or ends_x.shape != (len(x),) or ends_y.ndim != 1:
            raise FitError(
                f"states {x.shape}, source ends {ends_x.shape} and target ends {ends_y.shape} do not fit: "
                f"expected (T_x, {dx}), (T_x,) and (T_y,)"
            )
        if not len(x):
            raise FitError("a window without source tokens has no latents; leave it out")
        if not len(ends_y):
            return np.zeros((0, dy), dtype=np.float32)
        training = self.training
        self.eval()
        out = self(tensors_of(pack(self.layout, [(x, ends_x, ends_y)]), self.basis.device))[0]
        self.train(training)
        states: NDArray[np.float32] = (out * self.unit + self.mean_target).float().cpu().numpy()
        return states

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`from_tensors` needs beside the tensors; JSON."""
        own = {"unit": self.unit, "width": self.width, "depth": self.depth, "seed": self.seed}
        return {"layout": self.layout.options(), **own}

    def export(self) -> dict[str, NDArray[np.float32]]:
        """All weights and buffers, float32, named ``resampler.<name>``."""
        return {
            f"resampler.{name}": value.detach().cpu().float().numpy().copy()
            for name, value in self.state_dict().items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[np.float32]], options: Mapping[str, Any]) -> Resampler:
        """Rebuild a module.

        Args:
            tensors: From :meth:`export`; others beside them are ignored.
            options: From :attr:`options`.

        Raises:
            FitError: Something is missing or does not fit.
        """
        own = {name.removeprefix("resampler."): t for name, t in tensors.items() if name.startswith("resampler.")}
        try:
            layout = Layout(**options["layout"])
            _check_announced({**layout.options(), "width": options["width"], "depth": options["depth"]}, own)
            module = cls(
                layout,
                basis=own["basis"],
                mean_source=own["mean_source"],
                mean_target=own["mean_target"],
                readout=np.zeros((layout.most_coordinates, len(own["mean_target"])), dtype=np.float32),
                unit=options["unit"],
                width=options["width"],
                depth=options["depth"],
                seed=options["seed"],
            )
            module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in own.items()})
        except (LookupError, TypeError, RuntimeError, OverflowError) as error:
            raise FitError(
                f"these are not the tensors and options of a compress map ({error}); train it again"
            ) from error
        module.eval()
        return module


def _check_announced(options: Mapping[str, Any], own: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse sizes beyond what the tensors hold: a stranger's numbers would decide how much is allocated."""
    held = sum(tensor.size for tensor in own.values())
    for name in ("latents", "latent_dim", "width", "depth"):
        if options[name] > held:
            raise FitError(f"{name} {options[name]}: the map has {held} numbers in all; train it again")


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, N, C) by (B, P, Q) numbers: (B, P, Q, C)."""
    b, p, q = index.shape
    flat = index.reshape(b, p * q, 1).expand(-1, -1, values.shape[-1])
    return torch.gather(values, 1, flat).view(b, p, q, -1)


def tensors_of(packed: Packed, device: torch.device) -> dict[str, Tensor]:
    """A batch on a device.

    Args:
        packed: From :func:`align.compress.pack.pack`.
        device: Where to.
    """
    return {name: torch.from_numpy(value).to(device) for name, value in vars(packed).items()}
