"""The small model's training: its text is apart from the demo's, its parts do what they say, a seed gives one model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from featstore.demo.training.fit import Shape, Stage, fit, fit_counts, fresh_model, losses
from featstore.demo.training.measure import per_byte
from featstore.demo.training.ngrams import bigram_loss, bigram_table, unigram_loss
from featstore.demo.training.optimiser import Muon, orthogonalised
from featstore.demo.training.text import read_articles, shared_runs, tidy, word_runs
from featstore.demo.training.tokens import BOUNDARY, batches, encode, train_tokenizer

TINY = Shape(pieces=300, width=32, inner=48, blocks=2, heads=2)


def article(title: str, text: str) -> dict[str, str]:
    return {"title": title, "extract": text}


class TestText:
    SHARED = "the seine runs through the city of paris and on"

    def read(self, tmp_path, *articles, apart):
        path = tmp_path / "articles.json"
        path.write_text(json.dumps({each["title"]: each for each in articles}))
        return read_articles(path, apart)

    def test_what_shares_its_title_or_its_words_is_left_out(self, tmp_path):
        filler = "It is told at some length here, so that no one could take the article for a stub of any kind."
        found = self.read(
            tmp_path,
            article("Kept (river)", f"The Rhine runs elsewhere. {filler}"),
            article("Seine (river)", f"Another text of the same subject. {filler}"),
            article("France", f"In it, THE Seine, runs through the city -- of Paris. {filler}"),
            article("Stub", "Stub may refer to:"),
            apart=[("Seine", "nothing in common"), ("Rivers", f"Here {self.SHARED}.")],
        )
        assert found.dropped == ("Seine (river)", "France")
        assert found.held_out == (f"The Rhine runs elsewhere. {filler}",)
        assert found.train == ()

    def test_seven_words_in_a_row_may_be_shared(self, tmp_path):
        text = "The Seine runs through the city of Lyon, says whoever never was there, and in so many words."
        found = self.read(tmp_path, article("Lyon", text), apart=[("x", self.SHARED)])
        assert found.dropped == ()

    def test_one_in_fifty_is_held_out(self, tmp_path):
        texts = [f"Article number {number} is long enough to be kept, {'and goes on, ' * 5}" for number in range(120)]
        found = self.read(tmp_path, *(article(str(i), text) for i, text in enumerate(texts)), apart=[])
        assert found.held_out == tuple(tidy(texts[place]) for place in (0, 50, 100))
        assert len(found.train) == 117

    def test_tidy_composes_and_uses_plain_spaces(self):
        assert tidy("cafe\u0301\u00a0\u2009au  lait\n") == "café au lait"

    def test_runs_and_their_share(self):
        assert list(word_runs("A b, C d", 3)) == [("a", "b", "c"), ("b", "c", "d")]
        assert shared_runs(["a b c d"], ["x a b c"], 3) == 0.5
        assert shared_runs(["a b"], ["a b"], 3) == 0.0


@pytest.fixture(scope="module")
def tokenizer(sample_texts) -> Tokenizer:
    return train_tokenizer(sample_texts[:20], TINY.pieces)


class TestTokens:
    def test_every_byte_has_a_piece_and_digits_stand_alone(self, tokenizer):
        assert tokenizer.get_vocab_size() == TINY.pieces
        text = "Zürich 1889 🙂\n\tend"
        encoding = tokenizer.encode(text)
        assert encoding.ids[0] == tokenizer.token_to_id(BOUNDARY) == 0
        assert tokenizer.decode(encoding.ids) == text
        assert [token for token in encoding.tokens if token.isdigit()] == list("1889")

    def test_batches_hold_every_token_once_a_round_in_a_new_order(self):
        documents = [torch.arange(start, start + 10) for start in range(0, 120, 10)]
        stream = batches(documents, windows=2, length=5, seed=3)
        rounds = [torch.cat([next(stream).flatten() for _ in range(10)]) for _ in range(2)]
        assert all(torch.equal(each.sort().values, torch.arange(120)) for each in rounds)
        assert not torch.equal(rounds[0], rounds[1])
        again = batches(documents, windows=2, length=5, seed=3)
        assert torch.equal(next(again).flatten(), rounds[0][:12])


class TestCounts:
    TRAIN = (np.array([0, 1, 2, 1, 2]), np.array([0, 1, 3]))

    def test_the_table_is_a_distribution_and_kneser_neys(self):
        table, totals = bigram_table(self.TRAIN, 5)
        np.testing.assert_allclose(table.sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(totals, [2, 3, 1, 0, 0])
        # Piece 1 follows two others, 2 and 3 one each; one is added to all: 1, 3, 2, 2, 1 of 9.
        back_off = np.array([1, 3, 2, 2, 1]) / 9
        own = np.array([0, 0, 2 - 0.75, 1 - 0.75, 0]) / 3
        np.testing.assert_allclose(table[1], own + 0.75 * 2 / 3 * back_off, rtol=1e-6)
        np.testing.assert_allclose(table[4], back_off, rtol=1e-6)

    def test_losses_against_sums_by_hand(self):
        table, _ = bigram_table(self.TRAIN, 5)
        test = (np.array([0, 1, 2]), np.array([1, 3]))
        by_hand = -np.mean([math.log(table[0, 1]), math.log(table[1, 2]), math.log(table[1, 3])])
        assert bigram_loss(table, test) == pytest.approx(by_hand, rel=1e-6)
        counts = np.bincount([1, 2, 1, 2, 1, 3], minlength=5) + 1
        assert unigram_loss(self.TRAIN, test, 5) == pytest.approx(-np.mean(np.log(counts[[1, 2, 3]] / counts.sum())))

    def test_bits_per_byte(self):
        assert per_byte(math.log(2), 12, ["é", "four"]) == pytest.approx(12 / 6)


class TestOptimiser:
    @pytest.mark.parametrize("shape", [(20, 20), (12, 40), (40, 12)])
    def test_singular_values_go_near_one_and_directions_stay(self, shape):
        matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        found = orthogonalised(matrix)
        values = torch.linalg.svdvals(found[0])
        assert values.min() > 0.6
        assert values.max() < 1.3
        u, _, vh = torch.linalg.svd(matrix[0], full_matrices=False)
        assert torch.cosine_similarity(found[0].flatten(), (u @ vh).flatten(), dim=0) > 0.95

    def test_muon_moves_against_the_gradient_by_its_rate(self):
        matrix = torch.nn.Parameter(torch.zeros(6, 6))
        muon = Muon([matrix], 0.1)
        matrix.grad = torch.eye(6)
        muon.step()
        assert (matrix.diagonal() < -0.05).all()
        assert matrix.detach().norm(dim=1).max() < 0.13
        muon.zero_grad()
        before = matrix.detach().clone()
        muon.step()
        assert torch.equal(matrix, before)


class TestFit:
    """On a language where the token before the last one says what comes next, which no bigram can know."""

    @staticmethod
    def documents() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(60):
            first, second = torch.randint(1, 40, (2,), generator=generator).tolist()
            found.append(torch.tensor([0] + [first, second] * 15))
        return found

    def test_counts_reach_the_bigram_and_text_goes_beyond_it(self):
        documents = self.documents()
        shape = Shape(pieces=40, width=32, inner=48, blocks=2, heads=2)
        rows = [document.numpy() for document in documents]
        table, totals = bigram_table(rows, shape.pieces)
        model = fresh_model(shape, 0)
        seen: list[float] = []
        fit_counts(model, table, totals, steps=60, tick=lambda step, loss: seen.append(loss))
        assert len(seen) == 60
        entropy = -float((totals[:, None] * table * np.log(table)).sum() / totals.sum())
        assert seen[-1] == pytest.approx(entropy, abs=0.1)
        batch = torch.stack(documents)
        with torch.no_grad():
            before = losses(model, batch)[:, 4:].mean()
        fit(model, documents, seed=0, stages=(Stage(80, 8, 30), Stage(10, 4, 60)))
        with torch.no_grad():
            after = losses(model, batch)[:, 4:].mean()
        assert after < before - 0.5

    def test_one_seed_gives_one_model(self):
        documents = self.documents()[:8]

        def trained(seed: int) -> torch.Tensor:
            model = fresh_model(Shape(pieces=40, width=32, inner=48, blocks=1, heads=2), seed)
            fit(model, documents, seed=seed, stages=(Stage(3, 2, 10),))
            return model.model.layers[0].mlp.up_proj.weight.detach()

        state = torch.random.get_rng_state()
        assert torch.equal(trained(1), trained(1))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not torch.equal(trained(1), trained(2))


def test_the_shipped_tokenizer_is_the_kind_that_is_trained(sample_texts):
    from featstore.demo.small import shipped_path

    shipped = Tokenizer.from_file(str(shipped_path() / "tokenizer.json"))
    assert shipped.get_vocab_size() == Shape().pieces
    [ids] = encode(shipped, sample_texts[:1])
    assert shipped.decode(ids.tolist()) == sample_texts[0]
    trained = json.loads(train_tokenizer(sample_texts[:3], 300).to_str())
    content = json.loads(shipped.to_str())
    assert {name: value for name, value in content.items() if name != "model"} == {
        name: value for name, value in trained.items() if name != "model"
    }
