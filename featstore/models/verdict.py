"""What was tested on a model, and what came out: recorded in stores, cards and results as ``verified``.

Differences are relative: 0 is the same to the bit. A member that is null was not tested, because no command needed it.
"""

from __future__ import annotations

from featstore.runtime.records import EMPTY, Flag, Number, Record, Table, Whole


class ReadingVerdict(Record):
    """Whether a stored row is a function of its own text.

    Attributes:
        not_finite: First layer that holds NaN or infinity; null for none.
        future: Change of states when the tokens after them change; 0 up to rounding in a causal model.
        padding: Change of states when their text is padded at the right beside a longer one.
        neighbours: Change of states when other texts of the same length share the pass.
        far: Change of states when another text of the pass has positions near the end of the context; null where the
            model takes no positions.
        layer_0: Change of layer 0 of one token id from position to position.
        causal: Whether ``future`` is rounding.
        batching: ``padded``, ``equal`` or ``single``: which windows may share a pass.
        switch: Windows on either side of this length never share a pass; null for none.
        layer_0_is_table: Whether layer 0 depends on the token id alone.
    """

    not_finite: Whole | None = None
    future: Number | None = None
    padding: Number | None = None
    neighbours: Number | None = None
    far: Number | None = None
    layer_0: Number | None = None
    causal: Flag | None = None
    batching: str = "padded"
    switch: Whole | None = None
    layer_0_is_table: Flag | None = None


class ContinuingVerdict(Record):
    """How the model goes on from a prompt.

    Attributes:
        kind: ``cached`` (any number of new tokens from a cache), ``stepwise`` (one at a time) or ``recomputed`` (no
            cache gives the logits of the whole pass: the whole text is passed again).
        positions: Whether new tokens need explicit positions.
        whole_logits: Whether the logits of all tokens must be computed for the stream to be whole.
        difference: Of the logits from those of one pass over the whole text.
        padded: Whether prompts of several lengths may share a batch.
        padding: Difference of the logits of a prompt that is padded at the left.
        branching: ``shared``, or ``reread`` where two texts cannot go on from one cache.
    """

    kind: str = "cached"
    positions: Flag = False
    whole_logits: Flag = False
    difference: Number | None = None
    padded: Flag = True
    padding: Number | None = None
    branching: str = "shared"


class LayerVerdict(Record):
    """Whether putting states in at a layer does what it says.

    Attributes:
        self_identical: Whether the model's own stream, put back, gives its own logits to the bit.
        leak: The swap test. Text B is run with the whole stream of text A at the layer: largest difference of the
            logits from A's, over that between B's and A's. 0 means that the stream is all that later blocks know.
        skips: Whether the blocks below need not run when the whole stream is replaced.
        hide: The two-prompt test in one pass. Two prompts of other words, first word included, take the same states:
            largest difference of the logits at positions that took one, over the largest logit; null where the test
            was not run or could not be.
        hide_cached: The same of a text continued from a cache, from branches of it, with padding at the left.
        hide_refused: Why the two-prompt test could not be run; null where it could.
    """

    self_identical: Flag | None = None
    leak: Number | None = None
    skips: Flag | None = None
    hide: Number | None = None
    hide_cached: Number | None = None
    hide_refused: str | None = None


class Verdict(Record):
    """What was found out about a model by running it.

    Attributes:
        stack: Where its blocks are.
        blocks: Their number L.
        width: Width of a stored row.
        streams: Residual streams that a row folds.
        stream_dtype: Number type of the stream.
        embeddings: Token ids that have a vector.
        attention: Implementation of attention that ran; null where the model names none.
        left_out: Tensors of the checkpoint that the model was loaded without, because their part reads no text; null
            for none.
        repeats: Difference between the logits of two passes over the same tokens.
        reading: What storing states needs.
        continuing: What generating from a prompt needs; null where it was not tested.
        layers: What injecting needs, by layer.
        versions: Of the libraries that ran it.
    """

    stack: str = ""
    blocks: Whole = 0
    width: Whole = 0
    streams: Whole = 1
    stream_dtype: str = "float32"
    embeddings: Whole = 0
    attention: str | None = None
    left_out: str | None = None
    repeats: Number | None = None
    reading: ReadingVerdict | None = None
    continuing: ContinuingVerdict | None = None
    layers: Table[LayerVerdict] = EMPTY
    versions: Table[str] = EMPTY

    def for_storing(self) -> Verdict:
        """What a store records: the stream and the tests that reading it needs, whatever else is known by now."""
        kept = self.content()
        return Verdict.parse({k: v for k, v in kept.items() if k not in ("layers", "continuing", "repeats")})
