"""What a store holds, in numbers and in words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import SpecError
from featstore.runtime.console import human, human_bytes, human_seconds, progress
from featstore.store.moments.stored import has_rows
from featstore.store.read.first import first_rows
from featstore.store.read.store import Store
from featstore.text.roles import ROLES

#: One row in so many counts among the loudest.
_LOUDEST = 1000
#: Rows of a layer by which its ranks are told.
_RANK_ROWS = 2048
#: What is said of a model whose windows begin with the text.
_NO_START = ", no start token: the first token of each window is masked"


def summary(store: Store) -> dict[str, Any]:
    """What a store holds, for people and scripts.

    Args:
        store: Any complete store.
    """
    result: dict[str, Any] = {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "documents": store.attributes["split"]["documents"],
        "corpus_bytes": store.attributes["corpus"]["bytes"],
        "normalise": store.attributes["corpus"].get("normalise", "none"),
        "generate": store.attributes["corpus"].get("generate"),
        "messages": _messages(store),
        "bytes": sum(record["bytes"] for record in store.manifest.values()),
        "models": {},
        "pairs": {},
    }
    for name in store.models:
        model, table = store.model(name), store.tokens(name)
        result["models"][name] = {
            "reference": model.attributes.get("reference"),
            "rows": model.rows,
            "layers": list(model.layers),
            "width": model.width,
            "depth": model.depth,
            "sinks": int(table.sink.sum()),
            "special": int(table.special.sum()),
            "start_token": model.attributes.get("start_token"),
            "first_masked": int((first_rows(table.window, table.byte_end, table.special) & table.sink).sum()),
            "roles": _rows_of_roles(table.role, table.special),
        }
    for i, first in enumerate(store.models):
        for second in store.models[i + 1 :]:
            pairs = store.pairs(first, second)
            result["pairs"][f"{first}__{second}"] = {
                "pairs": len(pairs),
                "masked": int(pairs.sink.sum()),
                "coverage": {first: pairs.coverage[0], second: pairs.coverage[1]},
            }
    return result


def _messages(store: Store) -> dict[str, int]:
    """How many messages there are of every role, in the order of roles; nothing for ordinary text."""
    counts = np.bincount(store.corpus.message_role, minlength=len(ROLES)).tolist()
    return {role: count for role, count in zip(ROLES, counts, strict=True) if count}


def _rows_of_roles(role: NDArray[np.uint8], special: NDArray[np.bool_]) -> dict[str, int]:
    """How many ordinary rows somebody wrote, by role; nothing for ordinary text."""
    counts = np.bincount(role[~special], minlength=len(ROLES)).tolist()
    return {name: count for name, count in zip(ROLES[1:], counts[1:], strict=True) if count}


def describe(result: dict[str, Any]) -> str:
    """The summary as lines for people.

    Args:
        result: From :func:`summary` or :func:`extract`.
    """
    lines = [f"{result['store']}: {human_bytes(result['bytes'])}, fingerprint {result['fingerprint'][:12]}"]
    documents = ", ".join(f"{count} {split}" for split, count in result["documents"].items())
    form = " in Unicode form NFC" if result["normalise"] == "nfc" else ""
    lines.append(f"  text     {human_bytes(result['corpus_bytes'])}{form}, documents: {documents}")
    how = result.get("generate")
    if how:
        drawn = f"temperature {how['temperature']:g}, top-p {how['top_p']:g}, seed {how['seed']}"
        lines.append(
            f"  answers  up to {how['tokens']} tokens by {' and by '.join(how['with'])} after each prompt "
            f"({drawn if how['temperature'] else 'the likeliest each time'})"
        )
    if result.get("messages"):
        lines.append("  messages " + ", ".join(f"{human(n)} {role}" for role, n in result["messages"].items()))
    for name, model in result["models"].items():
        layers = ",".join(map(str, model["layers"]))
        lines.append(
            f"  {name:8} {human(model['rows'])} states of width {model['width']} at layers {layers} "
            f"of {model['depth']}; {model['sinks']} sinks{_NO_START if model['first_masked'] else ''}"
        )
        if model.get("roles"):
            lines.append("           " + ", ".join(f"{human(n)} of {role}" for role, n in model["roles"].items()))
    for key, pair in result["pairs"].items():
        coverage = ", ".join(f"{share:.1%} of {name}" for name, share in pair["coverage"].items())
        lines.append(f"  {key}: {human(pair['pairs'])} pairs cover {coverage}; {pair['masked']} masked as sinks")
    if "seconds" in result:
        lines.append(f"  took {human_seconds(result['seconds'])}")
    return "\n".join(lines)


def states_summary(store: Store, *, spectrum: bool = True, quiet: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """What the states of every layer are like: size on disk, where their energy sits, how many directions they use.

    Args:
        store: Any complete store.
        spectrum: Whether to compute ranks; they need rows and an eigenvalue problem for each layer.
        quiet: No progress.

    Returns:
        By model and layer: ``bytes`` with norms and scales; ``ratio``, bytes of plain bfloat16 over these;
        ``energy_top``, share of the sum of squared norms in the loudest 0.1 % of rows; ``energy_sinks``, share in the
        rows that the mask covers; ``effective_rank`` and ``participation_ratio`` (:func:`ranks_of`) of ``rank_rows``
        ordinary rows, spread evenly, neither masked nor special. What needs rows or norms that the store does not hold
        is None, and so are the ranks without ``spectrum``.
    """
    sizes = _layer_bytes(store)
    sites = [(name, layer) for name in store.models for layer in store.model(name).layers]
    result: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in store.models}
    with progress("spectra", len(sites), "layers", quiet=quiet or not spectrum) as tick:
        for name, layer in sites:
            model, table, held = store.model(name), store.tokens(name), has_rows(store, name, layer)
            found: dict[str, Any] = {
                "bytes": sizes[name, layer],
                "ratio": 2 * model.rows * model.width / sizes[name, layer] if held else None,
                "energy_top": None,
                "energy_sinks": None,
                "effective_rank": None,
                "participation_ratio": None,
                "rank_rows": 0,
            }
            if held or store.has(f"models/{name}/norm/{layer}"):
                energy = np.square(store.norms(name, layer), dtype=np.float64)
                whole = max(float(energy.sum()), np.finfo(np.float64).tiny)
                loudest = -(-len(energy) // _LOUDEST)
                found["energy_top"] = float(np.partition(energy, -loudest)[-loudest:].sum()) / whole
                found["energy_sinks"] = float(energy[table.sink].sum()) / whole
            ordinary = np.flatnonzero(~table.sink & ~table.special)
            count = min(len(ordinary), _RANK_ROWS)
            if held and spectrum and count > 1:
                chosen = ordinary[np.arange(count) * len(ordinary) // count]
                ranks = ranks_of(store.rows(name, layer)[chosen])
                found |= dict(zip(("effective_rank", "participation_ratio"), ranks, strict=True)) | {"rank_rows": count}
            result[name][str(layer)] = found
            tick(1)
    return result


def ranks_of(rows: NDArray[np.float32]) -> tuple[float, float]:
    """Two counts of the directions that rows vary in; both are d where d directions vary equally and no other does.

    Args:
        rows: float32 ``(n, width)``, n > 1; their mean is taken off. Neither count can exceed n - 1.

    Returns:
        The effective rank of the covariance, exp of the entropy of its eigenvalues as shares of their sum (Roy and
        Vetterli, EUSIPCO 2007), and the participation ratio, the sum squared over the sum of squares. 0 where
        nothing varies.
    """
    centred = rows.astype(np.float64)
    centred -= centred.mean(axis=0)
    # The covariance and the smaller of the two Gram matrices share all eigenvalues but zeros.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = np.maximum(np.linalg.eigvalsh(gram), 0)
    total = values.sum()
    if total <= 0:
        return 0.0, 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum())), float(1 / np.square(share).sum())


def describe_states(result: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The states of every layer as a table for people.

    Args:
        result: From :func:`states_summary`.
    """
    lines = ["           layer     bytes  x bf16  energy in top 0.1 %  in sinks  effective rank  participation      of"]
    for name, layers in result.items():
        for layer, of in layers.items():
            cells = [
                f"{human_bytes(of['bytes']):>9}",
                _cell(of["ratio"], "7.2f"),
                _cell(of["energy_top"], "20.1%"),
                _cell(of["energy_sinks"], "9.1%"),
                _cell(of["effective_rank"], "15.1f"),
                _cell(of["participation_ratio"], "14.1f"),
                f"{of['rank_rows'] or '-':>7}",
            ]
            lines.append(f"  {name:8} {layer:>5} " + " ".join(cells))
    if any(of["rank_rows"] for layers in result.values() for of in layers.values()):
        lines.append("  ranks: of the covariance of so many ordinary rows (no sinks, no special tokens), spread evenly")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    """A number, or a dash of the same width."""
    return format(value, form) if value is not None else "-".rjust(int(form.partition(".")[0]))


def _layer_bytes(store: Store) -> dict[tuple[str, int], int]:
    """Bytes on disk of every layer: rows, norms and scales."""
    result = {(name, layer): 0 for name in store.models for layer in store.model(name).layers}
    for path, record in store.manifest.items():
        kind, _, rest = path.partition("/")
        name, *parts = rest.split("/")
        if kind != "models" or path.endswith("zarr.json") or not parts:
            continue
        if parts[0] == "embedding":
            result[name, 0] += record["bytes"]
        elif parts[0] in ("resid", "norm", "row_scale", "column_scale"):
            result[name, int(parts[1])] += record["bytes"]
    return result


def window_table(store: Store, window: int, rows: int) -> dict[str, Any]:
    """A window token by token: text, norm at each layer, sink, partner in the other models.

    Args:
        store: Any complete store.
        window: Window number.
        rows: Tokens of each model at most.

    Raises:
        SpecError: No such window.
    """
    corpus = store.corpus
    count = len(corpus.window_document)
    if window >= count:
        raise SpecError(f"window {window} is outside 0..{count - 1} of {store.path}; choose one of these")
    raw = corpus.window_text(window).encode()
    result: dict[str, Any] = {"window": window, "document": int(corpus.window_document[window]), "models": {}}
    for name in store.models:
        table, model = store.tokens(name), store.model(name)
        first, end = (int(v) for v in np.searchsorted(table.window, [window, window + 1]))
        end = min(end, first + rows)
        norms = {layer: store.norms(name, layer)[first:end] for layer in model.layers}
        partners = {
            other: dict(zip(pairs.row_source.tolist(), pairs.row_target.tolist(), strict=True))
            for other in store.models
            if other != name
            for pairs in [store.pairs(name, other)]
        }
        entries, start = [], 0
        for row in range(first, end):
            stop = int(table.byte_end[row])
            entries.append(
                {
                    "row": row,
                    "id": int(table.id[row]),
                    "text": "" if table.special[row] else raw[start:stop].decode(errors="replace"),
                    "special": bool(table.special[row]),
                    "role": ROLES[table.role[row]],
                    "sink": bool(table.sink[row]),
                    "norms": {str(layer): float(values[row - first]) for layer, values in norms.items()},
                    "partner": {other: rows_of.get(row) for other, rows_of in partners.items()},
                }
            )
            start = max(start, stop)
        result["models"][name] = entries
    return result


def describe_window(result: dict[str, Any]) -> str:
    """A window's table as lines for people.

    Args:
        result: From :func:`window_table`.
    """
    lines = [f"window {result['window']} of document {result['document']}"]
    told = any(entry["role"] != ROLES[0] for entries in result["models"].values() for entry in entries)
    for name, entries in result["models"].items():
        layers = list(entries[0]["norms"]) if entries else []
        lines.append(f"{name}  row, norm at layer {', '.join(layers)}, partner, {'role, ' * told}text")
        for entry in entries:
            norms = " ".join(f"{value:9.1f}" for value in entry["norms"].values())
            partner = " ".join("-" if row is None else str(row) for row in entry["partner"].values())
            role = f"{'' if entry['special'] else entry['role']:10}" if told else ""
            marks = ("S" if entry["sink"] else " ") + ("*" if entry["special"] else " ")
            lines.append(f"  {entry['row']:7} {norms} {marks} {partner:>7}  {role}{entry['text']!r}")
    lines.append("S: attention sink (masked), *: special token (never pairs), -: no partner")
    begins = {name: entries[0] for name, entries in result["models"].items() if entries}
    lines += [
        f"{name}: {_NO_START.lstrip(', ')}" for name, first in begins.items() if first["sink"] and not first["special"]
    ]
    return "\n".join(lines)
