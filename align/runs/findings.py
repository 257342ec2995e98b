"""What a careful reader would object to in a run: pure functions over plain facts.

Codes, limits and words are those of :mod:`align.judging.table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.closed_form.scaling import Unscaled
from align.judging.findings import Finding, finding
from align.judging.table import limit
from align.runs.facts import Gram, Intercept, Site, Training
from align.solvers import lambda_grid
from align.statistics import FEWEST

# The clause of featstore.extraction.attributes.SITE_CONVENTION that matters here. Importing that module would bring
# torch along.
_BEFORE_THE_NORM = "L = before the final norm"


def findings(
    *,
    entry: Mapping[str, Any],
    parts: Mapping[str, float],
    n_train: int,
    width: int,
    coverage: tuple[float, float],
    keep_sinks: bool,
    gram: Gram | None = None,
    sites: Sequence[Site] = (),
    lam: float | None = None,
    training: Training | None = None,
    unscaled: Unscaled | None = None,
    intercept: Intercept | None = None,
    documents: int | None = None,
    pair: str = "",
) -> list[Finding]:
    """Every finding about one layer pair of a run.

    Args:
        entry: The pair's blocks ``train``, ``val``, ``test``, ``baselines`` and ``by_mask``; the last two may lack.
        parts: Components of the last epoch's train loss; empty for a closed form.
        n_train: Train pairs.
        width: Source width.
        coverage: Share of source and target tokens that have a partner.
        keep_sinks: Whether attention sinks were kept.
        gram: Of the source's train rows; None where nobody looked.
        sites: The layers that the map reads and writes.
        lam: Relative ridge strength that validation chose from :func:`align.solvers.lambda_grid`; None for a map
            without.
        training: How training ended; None for a closed form.
        unscaled: What a factor would do to a rotation without one; None for maps that have no such rotation.
        intercept: What one would do to a map without; None for maps with.
        documents: Test documents; None where nobody counted.
        pair: Key of the layer pair; named by every finding unless empty.
    """
    test, base = entry["test"], entry.get("baselines") or {}
    found = [
        *few_rows(n_train, width),
        *near_singular(gram),
        *low_coverage(coverage),
        *after_the_norm(sites),
        *sinks_kept(keep_sinks),
        *sinks_dominate(entry.get("by_mask") or {}),
        *infonce_at_chance(parts),
        *overfit(_r2(entry.get("train")), _r2(entry.get("val")), _r2(test)),
        *loses_to_closed_form(_r2(test), base.get("closed_form")),
        *no_better_than_controls(_r2(test), base),
        *token_explains(test, base.get("token")),
        *retrieval_at_chance(test.get("retrieval_top1"), test.get("retrieval_chance")),
        *lambda_at_the_end(lam),
        *still_improving(training),
        *few_documents(documents),
        *no_scale(unscaled),
        *no_intercept(intercept),
    ]
    return [{**each, "where": {"pair": pair} if pair else {}} for each in found]


def _r2(block: Mapping[str, Any] | None) -> float | None:
    return (block or {}).get("r2")


def few_rows(n_train: int, width: int) -> Iterator[Finding]:
    """Fewer than ten train pairs per source dimension.

    Args:
        n_train: Train pairs.
        width: Source width.
    """
    wanted = limit("few-rows", "per_dimension") * width
    if n_train < wanted:
        yield finding("few-rows", rows=n_train, width=width, wanted=wanted)


def near_singular(gram: Gram | None) -> Iterator[Finding]:
    """Source directions that the train rows say nothing about.

    Args:
        gram: Of the source's train rows.
    """
    if gram is None:
        return
    if gram.n <= gram.width:
        # About their mean, n rows span n - 1 dimensions at most.
        yield finding("near-singular", rows=gram.n, spanned=max(gram.n - 1, 0), width=gram.width)
    elif gram.below > limit("near-singular", "share"):
        yield finding("near-singular", below=gram.below, width=gram.width, condition=gram.condition)


def low_coverage(coverage: tuple[float, float]) -> Iterator[Finding]:
    """Many tokens of a side have no partner.

    Args:
        coverage: Share of source and target tokens that have one.
    """
    if min(coverage) < limit("coverage", "least"):
        yield finding("coverage", covered=min(coverage))


def after_the_norm(sites: Sequence[Site]) -> Iterator[Finding]:
    """The last layer of a store that was not made by this program and may hold states after the final norm.

    Args:
        sites: The layers that the map reads and writes.
    """
    for site in sites:
        if site.layer == site.depth and _BEFORE_THE_NORM not in (site.convention or ""):
            yield finding("after-final-norm", layer=site.layer, model=site.model, convention=site.convention or None)


def sinks_kept(keep_sinks: bool) -> Iterator[Finding]:
    """Attention sinks are among the rows.

    Args:
        keep_sinks: Whether they are.
    """
    if keep_sinks:
        yield finding("sinks-kept")


def sinks_dominate(by_mask: Mapping[str, Any]) -> Iterator[Finding]:
    """A few huge rows decide the similarity.

    Args:
        by_mask: Blocks ``masked`` and ``kept``, each with ``cka_debiased``; a block may be None.
    """
    masked, kept = ((by_mask.get(name) or {}).get("cka_debiased") for name in ("masked", "kept"))
    if masked is not None and kept is not None and abs(masked - kept) > limit("sink-dominated", "shift"):
        yield finding("sink-dominated", masked=masked, kept=kept)


def infonce_at_chance(parts: Mapping[str, float]) -> Iterator[Finding]:
    """The contrastive loss stayed near the logarithm of the batch size.

    Args:
        parts: Components of the last epoch's train loss, with ``infonce_chance`` beside ``infonce``.
    """
    if "infonce" not in parts:
        return
    loss, chance = parts["infonce"], parts["infonce_chance"]
    if chance - loss < limit("infonce-at-chance", "gain") * chance:
        yield finding("infonce-at-chance", loss=loss, chance=chance)


def overfit(train: float | None, val: float | None, test: float | None) -> Iterator[Finding]:
    """R2 falls from the rows that were fitted to those that were not.

    Args:
        train: R2 on train rows.
        val: On validation rows.
        test: On test rows.
    """
    gap = limit("overfit", "gap")
    if train is not None and any(r2 is not None and train - r2 > gap for r2 in (val, test)):
        yield finding("overfit", train=train, validation=val, test=test)


def loses_to_closed_form(r2: float | None, closed: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Training did worse than solving.

    Args:
        r2: Test R2 of the trained map.
        closed: Block of the closed-form optimum, with ``name`` and ``r2``; None for a map that was solved for.
    """
    best = _r2(closed)
    if closed is None or best is None or r2 is None:
        return
    if r2 < best - limit("loses-to-closed-form", "margin"):
        yield finding("loses-to-closed-form", r2=r2, best=best, optimum=closed["name"])


def no_better_than_controls(r2: float | None, base: Mapping[str, Any]) -> Iterator[Finding]:
    """A map that should not work does as well.

    Args:
        r2: Test R2.
        base: Blocks of the baselines by name.
    """
    controls = {name: _r2(base.get(name)) for name in ("mean", "identity", "random_rotation", "shuffled")}
    known = {name: value for name, value in controls.items() if value is not None}
    if r2 is None or not known:
        return
    best = max(known, key=lambda name: known[name])
    margin = limit("no-better-than-controls", "margin")
    # Nothing beats what leaves no error: two readings of one layer, where the identity is the answer.
    if r2 <= known[best] + margin and known[best] < 1 - margin:
        yield finding("no-better-than-controls", r2=r2, control=best, best=known[best])


def token_explains(test: Mapping[str, Any], token: Mapping[str, Any] | None) -> Iterator[Finding]:
    """The source's current token alone predicts the target as well as the map does.

    Args:
        test: Block of the map, with ``r2``, ``partial_r2`` and ``partial_r2_ci95``.
        token: Block of the prediction from the token alone; None where there is none.
    """
    r2, alone = _r2(test), _r2(token)
    if r2 is None or alone is None:
        return
    partial, (low, high) = test.get("partial_r2"), test.get("partial_r2_ci95") or (None, None)
    if partial is None:
        # Without sums of errors by document nothing is known of what the token leaves, unless it leaves nothing.
        explained = alone >= 1 - limit("token-explains", "rounding")
    else:
        explained = partial <= limit("token-explains", "margin") or (low is not None and low <= 0)
    if explained:
        yield finding("token-explains", r2=r2, token=alone, partial=partial, low=low, high=high)


def few_documents(documents: int | None) -> Iterator[Finding]:
    """Intervals rest on few test documents, or there are none.

    Args:
        documents: Test documents; None where nobody counted.
    """
    if documents is not None and documents < limit("few-documents", "wanted"):
        yield finding("few-documents", documents=documents, needed=FEWEST if documents < FEWEST else None)


def retrieval_at_chance(top1: float | None, chance: float | None) -> Iterator[Finding]:
    """Mapped states do not find their own partners.

    Args:
        top1: Share of mapped states nearest to their own partner.
        chance: What it would be for any map; None where there was no gallery.
    """
    if chance and top1 is not None and top1 < limit("retrieval-at-chance", "times") * chance:
        yield finding("retrieval-at-chance", top1=top1, chance=chance)


def lambda_at_the_end(lam: float | None) -> Iterator[Finding]:
    """Validation chose the strongest or the weakest ridge there was.

    Args:
        lam: Relative strength chosen; None for maps without.
    """
    low, high = (float(lambda_grid()[at]) for at in (0, -1))
    if lam is not None and lam >= high:
        yield finding("lambda-at-grid-end", lam=lam)
    elif lam is not None and lam <= low:
        yield finding("lambda-at-grid-start", lam=lam)


def still_improving(training: Training | None) -> Iterator[Finding]:
    """The last epoch allowed was the best.

    Args:
        training: How training ended.
    """
    if training is not None and 0 < training.epochs <= training.last_epoch == training.best_epoch:
        yield finding("still-improving", epoch=training.last_epoch, twice=2 * training.epochs)


def no_scale(unscaled: Unscaled | None) -> Iterator[Finding]:
    """A rotation without a factor between states of different norms.

    Args:
        unscaled: What a factor would do to it; None for other maps.
    """
    if unscaled is None:
        return
    factor, before, after = unscaled.factor, unscaled.before, unscaled.after
    low, high, margin = (limit("no-scale", name) for name in ("low", "high", "margin"))
    gains = before is not None and after is not None and after > before + margin
    if gains or not low <= factor <= high:
        yield finding("no-scale", factor=factor, before=before, after=after)


def no_intercept(intercept: Intercept | None) -> Iterator[Finding]:
    """A map without an intercept loses to one that has it.

    Args:
        intercept: What one would do; None for maps that have one.
    """
    if intercept is not None and intercept.with_one > intercept.without + limit("no-intercept", "margin"):
        yield finding("no-intercept", without=intercept.without, with_one=intercept.with_one)
