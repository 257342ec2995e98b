"""What a stitched run is judged by: sums over documents, and from them losses, divergences, shares and intervals.

Every figure is pooled over tokens, and its 95 % interval resamples whole documents, because the tokens of one document
depend on each other. With p the target's own predictions on untouched states and q those under a condition, in nats
for every scored token:

    loss = -log q(next token)        KL = sum_v p(v) (log p(v) - log q(v))

A loss can stay the same while the predictions change; the divergence cannot. Bits per byte divide by the bytes that the
scored tokens span, and so compare across tokenizers; perplexities, exp(loss), do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.metrics import document_bootstrap
from evaluate.injection.verified import leak_mark, leak_words
from featstore.text.roles import of_roles
from featstore.text.tokens import TokenizedWindow

#: The first token whose prediction counts: the first ones are read off the start of the text alone.
FIRST_SCORED = 2
#: Columns of a tally.
NATS, TOKENS, BYTES, DIVERGENCE, SAME = range(5)
#: Positions whose predictions over the whole vocabulary are held at once beside the logits.
_SLICE = 128


@dataclass
class Tally:
    """Sums by document: nats, tokens, bytes, nats of divergence, tokens with the same first choice."""

    sums: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def add(
        self, document: int, nats: float, tokens: int, size: int, divergence: float = 0.0, same: int | None = None
    ) -> None:
        """Add a window.

        Args:
            document: Document number.
            nats: Summed loss.
            tokens: Scored tokens.
            size: Bytes those tokens span.
            divergence: Summed KL from the untouched predictions.
            same: Tokens at which the likeliest prediction is that of the untouched model; None for all of them.
        """
        row = np.array([nats, tokens, size, divergence, tokens if same is None else same], dtype=np.float64)
        self.sums[document] = self.sums.get(document, np.zeros(len(row))) + row

    def table(self) -> NDArray[np.float64]:
        """``(documents, 5)`` in document order."""
        return np.stack([self.sums[d] for d in sorted(self.sums)])


def add_window(
    tally: Tally,
    document: int,
    tokens: TokenizedWindow,
    logits: torch.Tensor,
    clean: torch.Tensor | None = None,
    *,
    counts: NDArray[np.bool_] | None = None,
) -> None:
    """Score a window's predictions of its third token on, special tokens left out.

    Args:
        tally: Takes the sums.
        document: Its document.
        tokens: The window as the predicting model reads it, three tokens at least.
        logits: ``(tokens, vocabulary)`` under the condition.
        clean: The same with nothing replaced; None where these are the ones.
        counts: bool ``(tokens,)``, which of its ordinary tokens are scored; None for all.
    """
    ids = torch.from_numpy(tokens.ids.astype(np.int64)).to(logits.device)
    ordinary = ~tokens.special[FIRST_SCORED:]
    scored = ordinary if counts is None else ordinary & counts[FIRST_SCORED:]
    nats, divergence, same = _predictions(logits, logits if clean is None else clean, ids)
    ends = np.where(ordinary, tokens.byte_end[FIRST_SCORED:], 0)
    # What each token adds to the text read so far; special tokens, which read nothing, have 0.
    spans = np.diff(np.maximum.accumulate(np.r_[tokens.byte_end[:FIRST_SCORED].max(), ends]))
    tally.add(
        document,
        float(nats[scored].sum()),
        int(scored.sum()),
        int(spans[scored].sum()),
        float(divergence[scored].sum()),
        int(same[scored].sum()),
    )


def _predictions(
    logits: torch.Tensor, clean: torch.Tensor, ids: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Loss, divergence and agreement of every scored prediction, each ``(tokens - 2,)``."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(FIRST_SCORED - 1, len(ids) - 1, _SLICE):
        stop = min(start + _SLICE, len(ids) - 1)
        log_q = logits[start:stop].float().log_softmax(dim=-1)
        nats = -log_q.gather(1, ids[start + 1 : stop + 1, None])[:, 0]
        if logits is clean:
            parts.append((nats, torch.zeros_like(nats), torch.ones_like(nats, dtype=torch.bool)))
            continue
        log_p = clean[start:stop].float().log_softmax(dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        parts.append((nats, divergence, log_p.argmax(dim=-1) == log_q.argmax(dim=-1)))
    nats, divergence, same = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return nats.double().numpy(), divergence.double().numpy(), same.numpy()


def figures(table: NDArray[np.float64], mean: NDArray[np.float64] | None = None) -> dict[str, Any]:
    """Figures of a condition.

    Args:
        table: From :meth:`Tally.table`.
        mean: The same of the mean control, over the same documents; None where nothing is compared with it.

    Returns:
        ``nats_per_token`` with its interval ``ci95``, ``perplexity``, ``bits_per_byte``, ``kl`` from the untouched
        predictions in nats per token, ``top1``, the share of tokens with the untouched first choice, and, with
        ``mean``, ``below_mean``, nats per token less than under the mean control; each with its own ``<name>_ci95``.
        Bits per byte are None where the tokens span no byte.
    """
    sums = table.sum(axis=0)
    nats = sums[NATS] / sums[TOKENS]
    ci95 = document_bootstrap(table, (NATS, TOKENS))
    found: dict[str, Any] = {
        "nats_per_token": nats,
        "ci95": list(ci95),
        "perplexity": perplexity(nats),
        "perplexity_ci95": [perplexity(bound) for bound in ci95],
        **_bits(table),
    }
    for name, column in (("kl", DIVERGENCE), ("top1", SAME)):
        found[name] = sums[column] / sums[TOKENS]
        found[f"{name}_ci95"] = list(document_bootstrap(table, (column, TOKENS)))
    if mean is not None:
        joined = np.stack([mean[:, NATS] - table[:, NATS], table[:, TOKENS]], axis=1)
        found["below_mean"] = joined[:, 0].sum() / joined[:, 1].sum()
        found["below_mean_ci95"] = list(document_bootstrap(joined, (0, 1)))
    return found


def alone(table: NDArray[np.float64]) -> dict[str, Any]:
    """Figures of a model by itself on its own tokens.

    Args:
        table: From :meth:`Tally.table`.

    Returns:
        ``n_documents``, ``n_tokens``, ``n_bytes``, ``nats_per_token`` with ``ci95``, ``perplexity``, ``bits_per_byte``
        and their intervals.
    """
    block = figures(table)
    own = {name: block[name] for name in block if not name.startswith(("kl", "top1"))}
    counts = {"n_documents": len(table), "n_tokens": int(table[:, TOKENS].sum()), "n_bytes": int(table[:, BYTES].sum())}
    return counts | own


def perplexity(nats: float) -> float:
    """exp(loss); infinity where that is no number of float64.

    Args:
        nats: Loss per token.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def _bits(table: NDArray[np.float64]) -> dict[str, Any]:
    if not table[:, BYTES].any():
        return {"bits_per_byte": None, "bits_per_byte_ci95": [None, None]}
    bits = np.stack([table[:, NATS] / np.log(2), table[:, BYTES]], axis=1)
    total = bits.sum(axis=0)
    return {"bits_per_byte": total[0] / total[1], "bits_per_byte_ci95": list(document_bootstrap(bits, (0, 1)))}


def recovered(tables: Mapping[str, NDArray[np.float64]], control: str) -> dict[str, Any]:
    """Share of the way from a control's loss to the clean one: (control - mapped) / (control - clean).

    Args:
        tables: By condition; ``clean``, ``mapped`` and the control.
        control: Its name.

    Returns:
        ``value`` and ``ci95``; NaN where the control does no harm.
    """
    joined = np.concatenate([tables[name][:, :1] for name in (control, "mapped", "clean")], axis=1)

    def share(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        worst, mapped, clean = totals.T
        with np.errstate(divide="ignore", invalid="ignore"):
            result: NDArray[np.float64] = np.where(worst > clean, (worst - mapped) / (worst - clean), np.nan)
        return result

    value = float(share(joined.sum(axis=0, keepdims=True))[0])
    return {"value": value, "ci95": list(document_bootstrap(joined, share))}


def describe(result: dict[str, Any]) -> str:
    """The losses as lines for people.

    Args:
        result: From :func:`evaluate.stitching.stitch.stitch`.
    """
    lines = []
    hidden = result.get("keep") == "hide"
    for key, entry in result["pairs"].items():
        lines.append(
            f"{key}: {entry['n_tokens']} tokens{of_roles(result.get('roles'))} of {entry['n_documents']} documents, "
            f"{entry['replaced_share']:.0%} of positions replaced{', the others hidden' if hidden else ''}"
        )
        leak, known = entry.get("leak"), "leak" in entry
        if told := leak_words(leak, known=known):
            lines.append(f"  {told}")
        beside = leak_mark(leak, known=known)
        beside = f"  [{beside}]" if beside else ""
        for name, block in entry["conditions"].items():
            if block is None:
                lines.append(f"  {name:16} -  ({entry['reasons'].get(name, 'not run')})")
            else:
                lines.append(
                    f"  {name:16} {_number(block['nats_per_token'], '7.3f')} nats/token "
                    f"{_interval(block['ci95'], '.2f')}  {_number(block['bits_per_byte'], '6.3f')} bits/byte  "
                    f"KL {_number(block['kl'], '6.3f')}  top-1 {_number(block['top1'], '4.0%')}"
                    f"{'' if name == 'clean' else beside}"
                )
        best = entry["recovered_best_control"]
        for name, block in (("mean", entry["recovered"]), (best["control"], best)):
            share = f"{_number(block['value'], '6.1%')} against {name} {_interval(block['ci95'], '.1%')}"
            lines.append(f"  recovered {share}{beside}")
        lines += _alone_lines(entry)
        if entry.get("rate"):
            rate = entry["rate"]
            lines.append(
                f"  sent: {rate['latent_bytes']:,} bytes a window, "
                f"{rate['latent_bytes_per_text_byte']:.2f} for a byte of text"
            )
        if not entry["self_bit_identical"]:
            lines.append("  warning: self-injection changed the logits; do not trust these figures")
    return "\n".join(lines)


def _alone_lines(entry: dict[str, Any]) -> list[str]:
    blocks = {role: block for role, block in entry["alone"].items() if block}
    if "source" not in blocks:
        return []
    return [
        f"  {role} alone: perplexity {_number(block['perplexity'], '.2f')}, "
        f"{_number(block['bits_per_byte'], '.3f')} bits/byte {_interval(block['bits_per_byte_ci95'], '.2f')}"
        for role, block in blocks.items()
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(ci: Sequence[float | None], form: str) -> str:
    return f"[{', '.join(_number(value, form) for value in ci)}]"
