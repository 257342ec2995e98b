"""What a careful reader would object to in a run: pure functions over plain facts, each with its remedy.

A finding is ``{"code", "message"}``, with ``"level": "note"`` where it is no more than worth knowing. What the codes
mean stands in docs/reading-results.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.closed_form.scaling import Unscaled
from align.runs.facts import Gram, Intercept, Site, Training
from align.solvers import lambda_grid
from align.statistics import FEW_DOCUMENTS, FEWEST

Finding = dict[str, str]

#: Train pairs per source dimension below which held-out figures suffer.
PAIRS_PER_DIMENSION = 10
#: Share of either side's tokens that should have a partner.
LEAST_COVERAGE = 0.8
#: What R2 may fall by from train rows to held-out ones.
GAP = 0.1
#: R2 that counts as a difference to an optimum or a control.
MARGIN = 0.01
#: What R2 may lack of 1 where a prediction leaves no error but rounding.
NO_ERROR = 1e-6
#: Part of ln B that InfoNCE has to gain on chance.
INFONCE_GAIN = 0.1
#: Top-1 retrieval has to be so many times chance.
RETRIEVAL_FACTOR = 3
#: Least-squares factors of a rotation that count as 1.
NEAR_ONE = (0.8, 1.25)
#: Difference of debiased CKA with and without attention sinks that says the sinks make the figure.
SINK_SHIFT = 0.1
#: Share of directions below the floor that makes a Gram matrix near-singular.
SINGULAR_SHARE = 0.01

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
    """
    found = list(_all(entry, parts, n_train, width, coverage, keep_sinks, gram, sites, lam, training, documents))
    return [*found, *no_scale(unscaled), *no_intercept(intercept)]


def _all(
    entry: Mapping[str, Any],
    parts: Mapping[str, float],
    n_train: int,
    width: int,
    coverage: tuple[float, float],
    keep_sinks: bool,
    gram: Gram | None,
    sites: Sequence[Site],
    lam: float | None,
    training: Training | None,
    documents: int | None,
) -> Iterator[Finding]:
    test, base = entry["test"], entry.get("baselines") or {}
    yield from few_rows(n_train, width)
    yield from near_singular(gram)
    yield from low_coverage(coverage)
    yield from after_the_norm(sites)
    yield from sinks_kept(keep_sinks)
    yield from sinks_dominate(entry.get("by_mask") or {})
    yield from infonce_at_chance(parts)
    yield from overfit(_r2(entry.get("train")), _r2(entry.get("val")), _r2(test))
    yield from loses_to_closed_form(_r2(test), base.get("closed_form"))
    yield from no_better_than_controls(_r2(test), base)
    yield from token_explains(test, base.get("token"))
    yield from retrieval_at_chance(test.get("retrieval_top1"), test.get("retrieval_chance"))
    yield from lambda_at_the_end(lam)
    yield from still_improving(training)
    yield from few_documents(documents)


def _warn(code: str, message: str) -> Finding:
    return {"code": code, "message": message}


def _r2(block: Mapping[str, Any] | None) -> float | None:
    return (block or {}).get("r2")


def few_rows(n_train: int, width: int) -> Iterator[Finding]:
    """Fewer than ten train pairs per source dimension.

    Args:
        n_train: Train pairs.
        width: Source width.
    """
    if n_train < PAIRS_PER_DIMENSION * width:
        yield _warn(
            "few-rows",
            f"{n_train} train pairs for width {width}: under {PAIRS_PER_DIMENSION} per dimension, held-out figures "
            f"suffer: extract more text, {PAIRS_PER_DIMENSION * width} pairs or more, or fit fewer parameters",
        )


def near_singular(gram: Gram | None) -> Iterator[Finding]:
    """Source directions that the train rows say nothing about.

    Args:
        gram: Of the source's train rows.
    """
    if gram is None or (gram.n > gram.width and gram.below <= SINGULAR_SHARE):
        return
    if gram.n <= gram.width:
        # About their mean, n rows span n - 1 dimensions at most.
        why = f"{gram.n} train pairs span at most {max(gram.n - 1, 0)} of {gram.width} source dimensions"
    else:
        why = (
            f"{gram.below:.1%} of the {gram.width} source directions vary less than rounding does (condition number "
            f"{gram.condition:.1e})"
        )
    yield _warn(
        "near-singular",
        f"{why}: what the map does there is left to the solver, not to the data: extract more text, or fit fewer "
        "dimensions (reduced-rank, or procrustes within principal components)",
    )


def low_coverage(coverage: tuple[float, float]) -> Iterator[Finding]:
    """Many tokens of a side have no partner.

    Args:
        coverage: Share of source and target tokens that have one.
    """
    if min(coverage) < LEAST_COVERAGE:
        yield _warn(
            "coverage",
            f"only {min(coverage):.0%} of one side's tokens have a partner; figures speak for these alone, and tokens "
            "without one are mapped unseen: read the stitched loss beside R2",
        )


def after_the_norm(sites: Sequence[Site]) -> Iterator[Finding]:
    """The last layer of a store that was not made by this program and may hold states after the final norm.

    Args:
        sites: The layers that the map reads and writes.
    """
    for site in sites:
        if site.layer == site.depth and _BEFORE_THE_NORM not in (site.convention or ""):
            said = f"says {site.convention!r}" if site.convention else "does not say how it counts layers"
            yield _warn(
                "after-final-norm",
                f"layer {site.layer} is the last of {site.model}, and the store {said}: these states may lie after the "
                f"final norm, which is no residual stream and cannot be injected: use layers below {site.depth}, or "
                "extract again with `featstore extract`",
            )


def sinks_kept(keep_sinks: bool) -> Iterator[Finding]:
    """Attention sinks are among the rows.

    Args:
        keep_sinks: Whether they are.
    """
    if keep_sinks:
        yield _warn(
            "sinks-kept",
            "attention sinks are included; they can dominate R2 and CKA: compare by_mask, or leave out --keep-sinks",
        )


def sinks_dominate(by_mask: Mapping[str, Any]) -> Iterator[Finding]:
    """A few huge rows decide the similarity.

    Args:
        by_mask: Blocks ``masked`` and ``kept``, each with ``cka_debiased``; a block may be None.
    """
    masked, kept = ((by_mask.get(name) or {}).get("cka_debiased") for name in ("masked", "kept"))
    if masked is not None and kept is not None and abs(masked - kept) > SINK_SHIFT:
        yield _warn(
            "sink-dominated",
            f"debiased CKA is {masked:.3f} with attention sinks masked and {kept:.3f} with them in: the sinks make the "
            "difference; report the masked figure, and both where sinks matter",
        )


def infonce_at_chance(parts: Mapping[str, float]) -> Iterator[Finding]:
    """The contrastive loss stayed near the logarithm of the batch size.

    Args:
        parts: Components of the last epoch's train loss, with ``infonce_chance`` beside ``infonce``.
    """
    if "infonce" in parts and parts["infonce_chance"] - parts["infonce"] < INFONCE_GAIN * parts["infonce_chance"]:
        yield _warn(
            "infonce-at-chance",
            f"InfoNCE {parts['infonce']:.2f} is near {parts['infonce_chance']:.2f}, the logarithm of the batch size: "
            "nothing was learned from it; lower --temperature, raise its weight, or leave it out of --loss",
        )


def overfit(train: float | None, val: float | None, test: float | None) -> Iterator[Finding]:
    """R2 falls from the rows that were fitted to those that were not.

    Args:
        train: R2 on train rows.
        val: On validation rows.
        test: On test rows.
    """
    held = {name: r2 for name, r2 in (("validation", val), ("test", test)) if r2 is not None}
    if train is None or not any(train - r2 > GAP for r2 in held.values()):
        return
    rest = " and ".join(f"{r2:.3f} on {name}" for name, r2 in held.items())
    yield _warn(
        "overfit",
        f"R2 falls from {train:.3f} on train to {rest}: extract more text, or fit fewer parameters (--type procrustes, "
        "a smaller --rank)",
    )


def loses_to_closed_form(r2: float | None, closed: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Training did worse than solving.

    Args:
        r2: Test R2 of the trained map.
        closed: Block of the closed-form optimum, with ``name`` and ``r2``; None for a map that was solved for.
    """
    best = _r2(closed)
    if closed is not None and best is not None and r2 is not None and r2 < best - MARGIN:
        yield _warn(
            "loses-to-closed-form",
            f"test R2 {r2:.3f} is below the {closed['name']} optimum {best:.3f}: "
            "train longer or with another learning rate",
        )


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
    # Nothing beats what leaves no error: two readings of one layer, where the identity is the answer.
    if r2 <= known[best] + MARGIN and known[best] < 1 - MARGIN:
        yield _warn(
            "no-better-than-controls",
            f"test R2 {r2:.3f} does not beat the best control ({best}, {known[best]:.3f}): these layers may have "
            "nothing in common that such a map can express; try other layers, more text or --type affine",
        )


def token_explains(test: Mapping[str, Any], token: Mapping[str, Any] | None) -> Iterator[Finding]:
    """The source's current token alone predicts the target as well as the map does.

    Args:
        test: Block of the map, with ``r2``, ``partial_r2`` and ``partial_r2_ci95``.
        token: Block of the prediction from the token alone; None where there is none.
    """
    r2, alone = _r2(test), _r2(token)
    if r2 is None or alone is None:
        return
    partial, interval = test.get("partial_r2"), test.get("partial_r2_ci95")
    if partial is None:
        if alone < 1 - NO_ERROR:
            return  # nobody summed errors by document
        left = "nothing is left to explain"
    elif partial <= MARGIN or (interval is not None and interval[0] <= 0):
        ends = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
        if partial < 0:
            left = f"the map does worse than the token (partial R2 {partial:.3f}{ends})"
        else:
            left = f"of what the token leaves the map explains {partial:.3f}{ends} (partial R2)"
    else:
        return
    yield _warn(
        "token-explains",
        f"test R2 {r2:.3f}, and {alone:.3f} for a prediction from the source's current token alone: {left}. The two "
        "models may share no more here than the token that both have just read; do not speak of context. Try other "
        "layers, more text or another type of map",
    )


def few_documents(documents: int | None) -> Iterator[Finding]:
    """Intervals rest on few test documents, or there are none.

    Args:
        documents: Test documents; None where nobody counted.
    """
    if documents is None or documents >= FEW_DOCUMENTS:
        return
    said = f"{documents} test document{'s' * (documents != 1)}"
    if documents < FEWEST:
        said += f": below {FEWEST} there is no interval, and no figure can be told from chance"
    else:
        said += ": intervals are wide, and what holds of these documents need not hold of others"
    yield _warn("few-documents", f"{said}; extract more documents")


def retrieval_at_chance(top1: float | None, chance: float | None) -> Iterator[Finding]:
    """Mapped states do not find their own partners.

    Args:
        top1: Share of mapped states nearest to their own partner.
        chance: What it would be for any map; None where there was no gallery.
    """
    if chance and top1 is not None and top1 < RETRIEVAL_FACTOR * chance:
        yield _warn(
            "retrieval-at-chance",
            f"retrieval top-1 {top1:.3f} is near chance ({chance:.3f}): a mapped state does not tell which token it "
            "came from, whatever R2 says; look at r2_without_top_dims",
        )


def lambda_at_the_end(lam: float | None) -> Iterator[Finding]:
    """Validation chose the strongest or the weakest ridge there was.

    Args:
        lam: Relative strength chosen; None for maps without.
    """
    low, high = (float(lambda_grid()[at]) for at in (0, -1))
    if lam is None or low < lam < high:
        return
    if lam >= high:
        yield _warn(
            "lambda-at-grid-end",
            f"validation chose the strongest ridge of the grid (lambda {lam:g}): the map is shrunk towards the mean as "
            "far as it goes; there is little to learn from these rows: extract more text, or use --type procrustes",
        )
    else:
        message = (
            f"validation chose the weakest ridge of the grid (lambda {lam:g}): the rows need none; harmless unless "
            "near-singular or overfit is reported, too"
        )
        yield {**_warn("lambda-at-grid-end", message), "level": "note"}


def still_improving(training: Training | None) -> Iterator[Finding]:
    """The last epoch allowed was the best.

    Args:
        training: How training ended.
    """
    if training is not None and 0 < training.epochs <= training.last_epoch == training.best_epoch:
        yield _warn(
            "still-improving",
            f"epoch {training.last_epoch}, the last, was the best: training stopped before it was done; use --epochs "
            f"{2 * training.epochs}",
        )


def no_scale(unscaled: Unscaled | None) -> Iterator[Finding]:
    """A rotation without a factor between states of different norms.

    Args:
        unscaled: What a factor would do to it; None for other maps.
    """
    if unscaled is None:
        return
    factor, before, after = unscaled.factor, unscaled.before, unscaled.after
    gains, rise = False, ""
    if before is not None and after is not None:
        gains = after > before + MARGIN
        rise = f", and validation R2 of the rotation alone would rise from {before:.3f} to {after:.3f}"
    if NEAR_ONE[0] <= factor <= NEAR_ONE[1] and not gains:
        return
    yield _warn(
        "no-scale",
        f"the rotation has no factor, where least squares gives it {factor:.3g}{rise}: the two sides differ in norm, "
        "which no rotation and no map of low rank can mend; leave out --no-scale",
    )


def no_intercept(intercept: Intercept | None) -> Iterator[Finding]:
    """A map without an intercept loses to one that has it.

    Args:
        intercept: What one would do; None for maps that have one.
    """
    if intercept is not None and intercept.with_one > intercept.without + MARGIN:
        yield _warn(
            "no-intercept",
            f"validation R2 is {intercept.without:.3f} and {intercept.with_one:.3f} with an intercept: states lie far "
            "from zero, and a map without an intercept has to spend directions on their means; use --type affine",
        )
