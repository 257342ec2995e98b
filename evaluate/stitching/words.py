"""A stitched run in lines for people: first what is left beyond the token alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.judging.sentences import described
from evaluate.injection.verified import SIDE_CHANNEL, leak_mark, leak_words
from featstore.runtime.sheets import counted
from featstore.text.roles import of_roles


def describe(result: dict[str, Any]) -> str:
    """The losses as lines for people.

    Args:
        result: From :func:`evaluate.stitching.stitch.stitch`.
    """
    hidden = ", the others hidden" if result.get("keep") == "hide" else ""
    lines = []
    for key, entry in result["pairs"].items():
        lines.append(
            f"{key}: {entry['n_tokens']} tokens{of_roles(result.get('roles'))} of {documents_of(entry)}, "
            f"{entry['replaced_share']:.0%} of positions replaced{hidden}"
        )
        leak, known = entry.get("leak"), "leak" in entry
        beside = leak_mark(leak, known=known)
        beside = f"  [{beside}]" if beside else ""
        lines += [f"  {line}{beside}" for line in (_beyond_token(entry), _beaten(entry))]
        if told := leak_words(leak, known=known):
            lines.append(f"  {told}")
        for name, block in entry["conditions"].items():
            lines.append(f"  {name:16} {_losses(entry, name, block)}{'' if name == 'clean' or not block else beside}")
        lines.append(f"  recovered{_way(entry, 'recovered', ' {} from the mean state')}{beside}")
        lines += _alone_lines(entry)
        if rate := entry.get("rate"):
            lines.append(
                f"  sent: {rate['latent_bytes']:,} bytes a window, "
                f"{rate['latent_bytes_per_text_byte']:.2f} for a byte of text"
            )
        # The leak has a line of its own.
        others = (found for found in entry.get("warnings", ()) if found["code"] != SIDE_CHANNEL)
        lines += [f"  {described(found, 'pair')}" for found in others]
    return "\n".join(lines)


def documents_of(entry: dict[str, Any]) -> str:
    """How many documents stand behind the figures, and how many equally long ones would say as much.

    Args:
        entry: A layer pair's part of ``stitch.json``.
    """
    documents, effective = counted(entry["n_documents"], "document"), entry.get("effective_documents")
    return documents if effective is None else f"{documents} ({effective:.1f} effective)"


def _beyond_token(entry: dict[str, Any]) -> str:
    beyond = entry["beyond_token"]
    if beyond["nats"] is None:
        return f"beyond the token: not known ({entry['reasons'].get('beyond_token', 'not run')})"
    return (
        f"beyond the token: {beyond['nats']:+.3f} nats/token {_interval(beyond['ci95'], '+.3f')}"
        f"{_way(entry, 'recovered_token', ', {} of the way from the token alone to clean')}"
    )


def _beaten(entry: dict[str, Any]) -> str:
    closest = entry["closest_control"]
    block = entry["controls"].get(closest, {"nats": None, "ci95": None})
    margin = f"{_number(block['nats'], '+.3f')} nats/token {_interval(block['ci95'], '+.3f')}"
    known = entry["beats_every_control"]
    if known:
        return f"beats every control; the closest is {closest}, {margin}"
    if known is None:
        return f"not known to beat every control: {entry['reasons'].get('beats_every_control', 'not compared')}"
    stand = [name for name, against in entry["controls"].items() if against["beaten"] is False]
    return f"does not beat {', '.join(stand)}; the closest control is {closest}, {margin}"


def _losses(entry: dict[str, Any], name: str, block: dict[str, Any] | None) -> str:
    if block is None:
        return f"-  ({entry['reasons'].get(name, 'not run')})"
    return (
        f"{_number(block['nats_per_token'], '7.3f')} nats/token {_interval(block['ci95'], '.2f')}  "
        f"{_number(block['bits_per_byte'], '6.3f')} bits/byte  KL {_number(block['kl'], '6.3f')}  "
        f"top-1 {_number(block['top1'], '4.0%')}"
    )


def _way(entry: dict[str, Any], name: str, words: str) -> str:
    """A share in words, or why there is none."""
    share = entry[name]
    if share["value"] is None:
        return f": no share ({entry['reasons'].get(name, 'not run')})"
    return words.format(f"{share['value']:.1%} {_interval(share['ci95'], '.1%')}")


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


def _interval(ci: Sequence[float | None] | None, form: str) -> str:
    return "[no interval]" if ci is None else f"[{', '.join(_number(value, form) for value in ci)}]"
