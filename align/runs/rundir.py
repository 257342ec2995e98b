"""The files of a run directory while it is being made: its log, its epochs, its checkpoints, its ending.

Of several processes one writes. A run that goes on writes its log anew, since its checkpoints tell everything again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.layers import LayerPair
from align.maps.fitted import Aligner, save_adapter
from align.results import Documents, EpochRecord, Metrics, read_epochs, write_documents, write_epoch, write_metrics
from align.runs.logged import LogEvent
from align.scoring.rows import Epoch
from align.settings import Settings
from align.tokens.files import save_tables
from align.tokens.table import TokenTable
from featstore.errors import SpecError
from featstore.runtime.console import jsonable
from featstore.runtime.provenance import write_atomic
from featstore.runtime.writing import append_text, check_folder, refusing, remove_folder

#: Figures of an epoch that are also averaged over its layer pairs.
_AVERAGED = ("val_loss", "train_loss", "cka", "cosine_sim")

#: Folder of the states of an unfinished run.
_CHECKPOINTS = "checkpoints"


def default_directory(settings: Settings, source: str, target: str) -> Path:
    """The first free ``runs/<type>-<source>-<target>[-n]``.

    Args:
        settings: Of the run.
        source: Model name.
        target: Model name.
    """
    base = Path("runs") / f"{settings.type}-{source}-{target}"
    number = 2
    path = base
    while path.exists():
        path = base.with_name(f"{base.name}-{number}")
        number += 1
    return path


def check_free(out: Path, *, resume: bool) -> None:
    """Refuse a directory that holds a finished run, or one that holds none to go on with.

    Args:
        out: Run directory.
        resume: Whether an interrupted run is to be gone on with.

    Raises:
        SpecError: It is not what is needed.
    """
    if (out / "adapter.json").exists():
        remedy = "there is nothing to resume" if resume else "choose another directory or remove it"
        raise SpecError(f"--out {out} already holds a run; {remedy}")
    if resume and not (out / "run.yaml").is_file():
        raise SpecError(
            f"--resume: {out} holds no interrupted run (it has no run.yaml); leave out --resume to begin one"
        )


class RunDirectory:
    """Collects what a run writes.

    Args:
        out: Where.
        settings: Written to ``run.yaml``.
        resume: Keep the checkpoints that are there; else what an interrupted run left is removed.
        writes: Whether this process is the one that writes.

    Raises:
        SpecError: The directory cannot be made.
        LinkError: Its folder of checkpoints is a link.
        WriteError: It cannot be written to.
    """

    def __init__(self, out: Path, settings: Settings, *, resume: bool = False, writes: bool = True) -> None:
        self.path, self.writes = out, writes
        self.epochs: dict[int, dict[str, Any]] = {}
        self._old_epochs: dict[int, EpochRecord] = {}
        if not writes:
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(f"--out {out} cannot be made ({error.strerror}); choose another directory") from error
        check_folder(out, _CHECKPOINTS, make=False)
        if resume:
            self._old_epochs = {record.epoch: record for record in read_epochs(out)}
        else:
            remove_folder(out, _CHECKPOINTS)
        for left in (
            out / "log.jsonl",
            out / "metrics.json",
            out / "tokens.safetensors",
            *out.glob("eval_epoch_*.json"),
        ):
            with refusing(left):
                left.unlink(missing_ok=True)
        import yaml

        write_atomic(out / "run.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))

    def checkpoint(self, pair: LayerPair) -> Path:
        """Where the checkpoints of a layer pair go.

        Args:
            pair: Which layers.
        """
        return check_folder(self.path, _CHECKPOINTS, pair.key.replace(":", ".").replace("->", "__"), make=False)

    def step(self, pair: LayerPair, event: Mapping[str, Any]) -> None:
        """Log what a step measured.

        Args:
            pair: Which layers.
            event: With ``epoch`` and ``step``.
        """
        self._log({**event, "event": "step", "pair": pair.key})

    def epoch(self, pair: LayerPair, epoch: Epoch, models: Mapping[str, Any] | None = None) -> None:
        """Write an epoch's figures: a line of the log, and the pair's part of ``eval_epoch_<n>.json``.

        Args:
            pair: Which layers.
            epoch: What it measured.
            models: What both models say of its map (``stitched``, ``generations``), where they were asked. An epoch
                that is told again keeps what they said the first time.
        """
        if models is None:
            models = self._said_before(pair, epoch.epoch)
        figures = {
            "val_loss": epoch.val_loss,
            "train_loss": epoch.train_loss,
            "train_parts": epoch.parts,
            "val_parts": epoch.val_parts,
            "recent_loss": epoch.recent_loss,
            "grad_norm": epoch.grad_norm,
            "cka": epoch.val.get("cka_debiased"),
            "cosine_sim": epoch.val.get("cosine"),
            "val": epoch.val,
        }
        if models is not None:
            figures["stitched"] = models["stitched"]
        about = {"pair": pair.key, "epoch": epoch.epoch, "lr": epoch.lr, "seconds": epoch.seconds}
        self._log({"event": "epoch", **about, **figures})
        record = self.epochs.setdefault(epoch.epoch, {"epoch": epoch.epoch, "generations": [], "pairs": {}})
        record["pairs"][pair.key] = figures
        record["generations"] += models["generations"] if models is not None else []
        for key in _AVERAGED:
            values = [entry[key] for entry in record["pairs"].values() if entry[key] is not None]
            record[key] = sum(values) / len(values) if values else None
        if self.writes:
            write_epoch(self.path, EpochRecord.parse(jsonable(record)))

    def stop(self, pair: LayerPair, *, epoch: int, best_epoch: int, reason: str) -> None:
        """Log why a pair's training ended.

        Args:
            pair: Which layers.
            epoch: The last one.
            best_epoch: The one that is kept.
            reason: In words.
        """
        self._log({"event": "stop", "pair": pair.key, "epoch": epoch, "best_epoch": best_epoch, "reason": reason})

    def last_epoch(self, pair: LayerPair) -> dict[str, Any]:
        """The figures of a pair's last epoch so far.

        Args:
            pair: Which layers.
        """
        own = [record["pairs"][pair.key] for _, record in sorted(self.epochs.items()) if pair.key in record["pairs"]]
        return dict(own[-1])

    def finish(
        self,
        metrics: Mapping[str, Any],
        documents: Mapping[str, Any],
        aligners: Sequence[Aligner],
        card: dict[str, Any],
        tables: Mapping[str, TokenTable],
    ) -> None:
        """Write metrics, per-document sums, curves, tables, the maps and, last, their card; remove the checkpoints.

        Args:
            metrics: ``metrics.json``.
            documents: ``documents.json``.
            aligners: The maps.
            card: The card without the pairs.
            tables: Predictions from the token alone, by :func:`align.tokens.table.table_key`.
        """
        if not self.writes:
            return
        # Only here: of several processes one draws.
        from align.runs.plots import plot_curves

        write_documents(self.path, Documents.parse(jsonable(documents)))
        write_metrics(self.path, Metrics.parse(jsonable(metrics)))
        plot_curves(self.epochs, dict(metrics["pairs"]), self.path)
        save_tables(self.path, tables, [aligner.pair for aligner in aligners], store=card["store"]["fingerprint"])
        save_adapter(self.path, aligners, card)
        remove_folder(self.path, _CHECKPOINTS)

    def _said_before(self, pair: LayerPair, epoch: int) -> dict[str, Any] | None:
        """What both models said of an epoch before the run was interrupted."""
        old = self._old_epochs.get(epoch, EpochRecord())
        if pair.key not in old.pairs or not old.pairs[pair.key].has("stitched"):
            return None
        own = [entry.content() for entry in old.generations if entry.pair == pair.key]
        return {"stitched": old.pairs[pair.key].stitched, "generations": own}

    def _log(self, event: Mapping[str, Any]) -> None:
        if self.writes:
            line = LogEvent.parse(jsonable(dict(event))).content()
            append_text(self.path / "log.jsonl", json.dumps(line, allow_nan=False) + "\n")
