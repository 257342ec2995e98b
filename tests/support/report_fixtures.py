"""Synthetic run and CKA directories for the report's tests, and a strict reader of the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from align.judging.table import JUDGED
from align.pages.document import DRAWN
from align.runs.findings import findings
from evaluate.reporting import build_report
from tests.support.drawings import titles, unpacked

PAIR = "smol:15->twin:15"
_VOID = {"meta", "link", "br", "img", "input", "hr", "area", "base", "col", "embed", "source"}


def block(r2: float, **other: Any) -> dict[str, Any]:
    figures = {
        "r2": r2,
        "r2_median_dim": r2 - 0.0601,
        "r2_without_top_dims": r2 - 0.02,
        "mse": 1.25,
        "cosine": 0.951,
        "cosine_centered": 0.9312,
        "cka_debiased": 0.9,
        "cka_debiased_rows": 0.91,
        "retrieval_top1": 0.9023,
        "retrieval_top5": 0.99,
        "retrieval_mrr": 0.93,
        "retrieval_median_rank": 1,
        "retrieval_chance": 1 / 512,
        "retrieval_gallery": 512,
        "n": 1500,
    }
    return figures | other


def judge(scored: dict[str, Any]) -> dict[str, Any]:
    """A run's figures with the findings that `align train` makes of them."""
    for key, entry in scored["pairs"].items():
        facts: dict[str, Any] = {"n_train": 4312, "width": 576, "coverage": (1.0, 1.0), "keep_sinks": False}
        entry["warnings"] = findings(entry=entry, parts={}, pair=key, **facts)
    return scored


def metrics(r2: float = 0.861, closed: float = 0.8703) -> dict[str, Any]:
    figures = {
        "type": "procrustes",
        "pairs": {
            PAIR: {
                "train": block(r2 + 0.01),
                "val": block(r2),
                "test": block(r2, r2_ci95=[r2 - 0.02, r2 + 0.02], partial_r2=0.749, partial_r2_ci95=[0.7013, 0.7924]),
                "by_mask": {"masked": block(0.86), "kept": block(-133.07)},
                "baselines": {
                    "token": block(0.4462),
                    "mean": block(0.0),
                    "identity": block(-1.2),
                    "random_rotation": block(-0.81),
                    "shuffled": block(-0.11),
                    "closed_form": block(closed, name="ridge"),
                },
                "reasons": {},
            }
        },
        "judged": JUDGED,
    }
    return judge(figures)


def loss(value: float, spread: float = 0.21) -> dict[str, Any]:
    return {
        "nats_per_token": value,
        "bits_per_byte": value / 3.13,
        "ci95": [value - spread, value + spread],
    }


#: Why a run without a table of tokens lacks what is counted from it.
WITHOUT = dict.fromkeys(("token", "beyond_token", "recovered_token"), "the run has no table of tokens")
WITHOUT["beats_every_control"] = "not compared with token"


def against(nats: float, ci: tuple[float, float] | None) -> dict[str, Any]:
    beaten = None if ci is None else ci[0] > 0
    return {"nats": nats, "ci95": None if ci is None else list(ci), "p": None if ci is None else 0.01, "beaten": beaten}


def stitch(
    mapped: float = 4.79,
    recovered: float | None = 0.8547,
    gain: float | None = 0.9041,
    gain_ci: tuple[float, float] | None = (0.7012, 1.1063),
    **conditions: Any,
) -> dict[str, Any]:
    """A stitched pair whose token control loses ``gain`` nats more than the map; None for a run without it."""
    losses = {
        "clean": 3.7,
        "mean": 11.2,
        "zero": 10.84,
        "random_norm": 14.1,
        "random_rotation": 13.2,
        "shuffled": 10.71,
    }
    others = {name: loss for name, loss in losses.items() if name != "clean"}
    controls = {
        name: against(loss - mapped, (loss - mapped - 0.3, loss - mapped + 0.3)) for name, loss in others.items()
    }
    if gain is not None:
        controls["token"] = against(gain, gain_ci)
    beaten = {block["beaten"] for block in controls.values()}
    share = None if gain is None else gain / (mapped + gain - losses["clean"])
    return {
        "adapter_type": "procrustes",
        "split": "test",
        "pairs": {
            PAIR: {
                "n_documents": 24,
                "effective_documents": 18.5,
                "n_tokens": 12043,
                "replaced_share": 0.9312,
                "conditions": {
                    "clean": loss(3.7),
                    "self": loss(3.7),
                    "mapped": loss(mapped),
                    "token": None if gain is None else loss(mapped + gain),
                    **{name: loss(value) for name, value in others.items()},
                    "raw": None,
                }
                | conditions,
                "reasons": {"raw": "widths differ (576 and 960)"} | ({} if gain is not None else dict(WITHOUT)),
                "recovered": {"value": recovered, "ci95": [0.8213, 0.8822]},
                "recovered_token": {"value": share, "ci95": None if share is None else [share - 0.05, share + 0.05]},
                "beyond_token": controls.get("token", {"nats": None, "ci95": None, "p": None, "beaten": None}),
                "controls": controls,
                "beats_every_control": False if False in beaten else None if None in beaten or gain is None else True,
                "closest_control": min(controls, key=lambda name: controls[name]["nats"]),
            }
        },
    }


def generations() -> dict[str, Any]:
    def injected(mapped: str, own: str) -> dict[str, str]:
        return {
            "mapped": mapped,
            "self": own,
            "mean": " the the the",
            "random_norm": ",,,",
            "shuffled": " a list of albums",
        }

    return {
        "max_new_tokens": 32,
        "decoding": "greedy",
        "entries": [
            {
                "prompt": "The capital of France is",
                "source": "smol",
                "target": "twin",
                "source_alone": " Paris, the largest city",
                "target_alone": " Paris. It is",
                "source_to_target": {PAIR: injected(" Paris. It is", " Paris. It is")},
                "target_to_source": {"twin:15->smol:15": injected(" a list of albums", " Paris, the largest city")},
            }
        ],
    }


def adapter(kind: str = "procrustes") -> dict[str, Any]:
    model = {"family": "llama", "depth": 30, "width": 576}
    return {
        "format": 1,
        "type": kind,
        "pairs": [
            {
                "key": PAIR,
                "source": {"model": "smol", "layer": 15, "width": 576},
                "target": {"model": "twin", "layer": 15, "width": 576},
                "parameters": {"trainable": 36864, "shipped": 331776},
                "options": {"lambda": None, "rank": None, "alpha": None, "scale": 1.0},
            }
        ],
        "models": {
            "smol": {"reference": "/srv/private/smollm2.gguf", **model},
            "twin": {"reference": "org/twin", **model, "family": "mistral"},
        },
        "store": {"path": "/srv/private/demo.zarr", "fingerprint": "9f2a77c0" * 8},
        "corpus": {
            "source": {"kind": "text", "location": "/srv/private/wiki.txt", "split": None},
            "documents": 89,
            "bytes": 31529,
            "sha256": "1c4e32c4" * 8,
        },
        "coverage": {"smol": 0.9686, "twin": 0.9041},
        "pair_policy": "end",
        "mask": {"sink_threshold": 5.0, "keep_sinks": False},
        "provenance": {"versions": {"numpy": "2.4.1", "torch": "2.9.0"}, "seed": 0},
    }


def cka() -> dict[str, Any]:
    return {
        "models": ["smol", "twin"],
        "layers": {"smol": [0, 15], "twin": [0, 15, 30]},
        "estimator": "debiased",
        "kernel": "linear",
        "n": 15000,
        "reasons": {"twin:15 smol:15": "HSIC of twin:15 is not positive"},
        "cross": [[0.9512345, 0.31, -0.0213], [0.42, None, 0.55]],
        "within": {
            "smol": [[1.0, 0.4], [0.4, 1.0]],
            "twin": [[1.0, 0.3, 0.2], [0.3, 1.0, 0.5], [0.2, 0.5, 1.013]],
        },
        "null": {
            "cross": [[0.004, -0.003, 0.01], [0.0, 0.002, -0.006]],
            "n": 4096,
            "method": "shuffled pairs",
        },
        "masked_rows": 40,
        "keep_sinks": False,
        "unmasked": {"cross": [[0.99, 0.98, 0.97], [0.99, 0.98, 0.97]], "n": 15040},
    }


def measured() -> dict[str, Any]:
    """A similarity with other measures, as `align cka --measures` writes it."""
    sides = {"closer": "higher", "symmetric": True, "bounds": [None, 1], "reasons": {}}
    distances = [[12.5, 80.0, 97.25], [70.5, None, 60.0]]
    return cka() | {
        "measures": {
            "rsa": {
                "title": "RSA",
                "cross": [[0.91, 0.32, 0.1], [0.4, 0.88, -0.05]],
                "floors": {"shuffled": {"cross": [[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]]}},
                "permutations": {
                    "documents": {
                        "mean": [[0.07, 0.08, 0.09], [0.1, 0.11, 0.12]],
                        "p95": [[0.1, 0.1, 0.1], [0.2, 0.2, 0.2]],
                        "draws": 39,
                        "p_max": [[0.025, 0.5, 1.0], [0.2, 0.05, 1.0]],
                    }
                },
                **sides,
            },
            "procrustes-distance": {"cross": distances, **sides, "closer": "lower", "bounds": [0, None]},
            "svcca": {"cross": [[None] * 3] * 2, **sides, "reasons": {"twin:0 smol:0": "too few rows"}},
        },
        "effective_rank": {
            "smol": {"0": {"entropy": 186.1, "participation": 59.6}, "15": {"entropy": 150.5, "participation": 40.25}},
            "twin": {"0": {"entropy": 190.0}},
        },
        "sample": {"rows": 400, "of": 15000, "documents": 60, "draws": 50, "seed": 0},
    }


def communicated() -> dict[str, Any]:
    def right(accuracy: float, low: float, high: float, size: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "ci95": [low, high], "bytes": size, "unknown": {"more": 1}}

    return {
        "unknown": [1],
        "tasks": {
            "countries": {
                "n": 50,
                "chance": 0.02,
                "conditions": {
                    "silent": right(0.04, 0.01, 0.13, 0),
                    "text": right(0.96, 0.87, 0.99, 38.4),
                    "aligned": right(0.82, 0.69, 0.9, 11520),
                    "replace": right(0.08, 0.03, 0.19, 1152),
                    "random": right(0.06, 0.02, 0.16, 1152),
                },
                "warnings": [{"code": "x", "message": "only 50 examples"}, "names repeat"],
            }
        },
    }


def compressed(latents: int = 4, r2: float = 0.5, stitched: float = 6.1) -> dict[str, Any]:
    """A run of compressed windows, by file name."""
    scored, spliced = metrics(r2), stitch(stitched, 0.6)
    size = latents * 16 * 2
    scored["type"] = "compress"
    scored["pairs"][PAIR]["rate_distortion"] = {
        "latents": latents,
        "latent_dim": 16,
        "bytes_per_window": size,
        "bytes_per_text_byte": size / 500,
        "text_bytes": 500,
        "token_id_bytes": 245.5,
        "raw_bytes": 139008,
        "side_bytes": 120,
        "r2": {"compress": r2, "pca": r2 - 0.1, "strided": r2 - 0.25},
    }
    spliced["pairs"][PAIR]["rate"] = {"latent_bytes": size, "latent_bytes_per_text_byte": size / 512}
    return {"metrics.json": scored, "stitch.json": spliced}


def log() -> list[dict[str, Any]]:
    epochs = [
        {
            "event": "epoch",
            "pair": PAIR,
            "epoch": n,
            "train_loss": 0.5 / n,
            "val_loss": 0.6 / n + 0.01,
            "lr": 1e-3 / n,
            "seconds": 3.25,
        }
        for n in (1, 2, 3)
    ]
    reason = "stopped at epoch 3: no gain of 0.001 in 2 epochs"
    return [
        *epochs,
        {"event": "stop", "pair": PAIR, "best_epoch": 2, "reason": reason},
    ]


def epoch(n: int) -> dict[str, Any]:
    losses = {"train_loss": 0.5 / n, "val_loss": 0.6 / n, "cka": 0.9, "cosine_sim": 0.91}
    return {"epoch": n, **losses, "generations": [], "pairs": {PAIR: losses}}


def documents() -> dict[str, Any]:
    """A whole run, by file name."""
    return {
        "adapter.json": adapter(),
        "metrics.json": metrics(),
        "stitch.json": stitch(),
        "generations.json": generations(),
        "cka.json": cka(),
        "communicate.json": communicated(),
        "eval_epoch_1.json": epoch(1),
        "eval_epoch_2.json": epoch(2),
    }


def write(directory: Path, files: dict[str, Any], events: list[Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    if events is not None:
        (directory / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return directory


class Page(HTMLParser):
    """Reads the page, everything unfolded, and refuses tags that do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.raw, self.html = html, unpacked(html)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.figures: list[tuple[dict[str, str], str]] = []
        self.titles = titles(self.html)
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.data_blocks: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in _VOID:
            self.stack.append(tag)
        if tag == "data":
            self.figures.append((found, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}> at {self.getpos()}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        inside = self.stack[-1] if self.stack else ""
        if inside == "data":
            attrs, text = self.figures[-1]
            self.figures[-1] = (attrs, text + data)
        if inside == "script":
            # A data block runs nothing.
            block = self.tags[-1][1].get("type") == "application/json"
            (self.data_blocks if block else self.scripts).append(data)
        elif inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def check(self) -> None:
        """What must hold for every page: self-contained, one known script, distinct ids."""
        ids = self.attributes("id")
        assert len(ids) == len(set(ids))
        for name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data", "background"):
            for value in self.attributes(name):
                known = ("#", "data:,", "./", "../") if name == "href" else ()
                assert value.startswith(known), f"{name}={value}"
        for tag in ("iframe", "object", "embed", "img", "base", "form", "foreignobject"):
            assert tag not in [name for name, _ in self.tags]
        assert not [name for _, attrs in self.tags for name in attrs if name.startswith("on") or name == "style"]
        styles = re.findall(r"<style>(.*?)</style>", self.html, re.DOTALL)
        assert len(styles) == 1
        assert "url(" not in styles[0]
        # What is packed runs as little as the rest.
        assert not re.search(r"<script(?! type=)", self.html.replace("<script>", "", 1))
        assert "@import" not in styles[0]
        urls = re.findall(r"url\(([^)]*)\)", self.html.replace(self.scripts[0], ""))
        assert not urls
        assert len(self.scripts) == 1
        digest = base64.b64encode(hashlib.sha256(self.scripts[0].encode()).digest()).decode()
        (policy,) = [c for c in self.attributes("content") if "script-src" in c]
        assert f"script-src 'sha256-{digest}';" in policy
        digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}' '{DRAWN}';" in policy
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy


def page(*dirs: Path, base: Path | None = None) -> Page:
    found = Page(build_report(dirs, base))
    found.check()
    return found


def run_of(tmp_path: Path, name: str = "run", **replaced: Any) -> Path:
    files = documents()
    for key, content in replaced.items():
        files[f"{key}.json"] = content
    return write(tmp_path / name, {k: v for k, v in files.items() if v is not None}, log())
