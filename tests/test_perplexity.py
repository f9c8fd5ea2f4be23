import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.baselines import (
    KneserNeyBigram,
    LanguageModel,
    Unigram,
    document_nats,
    fit_bigram,
    fit_unigram,
)
from mlx_transfusion.evaluation.perplexity import (
    TextScores,
    caption_document,
    described_document,
    score_documents,
    text_document,
)
from mlx_transfusion.models.transfusion import Transfusion

CONFIG = ModelConfig(
    vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    image_height=8, image_width=8, patch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transfusion:
    mx.random.seed(1)
    return Transfusion(CONFIG)


def texts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, CONFIG.vocab_size, rng.integers(1, 40)).tolist() for _ in range(count)]


# ---- the model ----


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    uniform = Transfusion(CONFIG)
    uniform.lm_head.weight = mx.zeros_like(uniform.lm_head.weight)
    ids = texts(9)
    scores = score_documents(uniform, [text_document(t, CONFIG) for t in ids])
    assert scores.tokens.tolist() == [len(t) + 1 for t in ids]  # the text and EOS
    summary = scores.summary(characters=100)
    assert summary["perplexity"] == pytest.approx(23, rel=1e-5)
    assert summary["perplexity_interval"] == pytest.approx([23, 23], rel=1e-5)
    assert summary["bits_per_character"] == pytest.approx(scores.tokens.sum() * math.log2(23) / 100, rel=1e-5)


def test_nats_of_a_text_are_the_sum_over_its_prefixes(model: Transfusion) -> None:
    text = texts(1, seed=5)[0]
    whole = [CONFIG.bos_token_id, *text, CONFIG.eos_token_id]
    expected = 0.0
    for i in range(1, len(whole)):
        logits, _ = model.prefill(np.array([whole[:i]]), np.array([i]))
        row = np.array(logits[0], np.float64)
        expected += np.log(np.exp(row).sum()) - row[whole[i]]
    scores = score_documents(model, [text_document(text, CONFIG)])
    assert scores.nats[0] == pytest.approx(expected, rel=1e-4)


def test_scores_do_not_depend_on_the_batch(model: Transfusion) -> None:
    documents = [text_document(t, CONFIG) for t in texts(25)]
    one_by_one = np.concatenate([score_documents(model, [d]).nats for d in documents])
    for batch_tokens in (1, 64, 300, 10**6):
        scores = score_documents(model, documents, batch_tokens=batch_tokens)
        np.testing.assert_allclose(scores.nats, one_by_one, rtol=1e-5)


def test_a_described_caption_is_read_after_its_own_picture(model: Transfusion) -> None:
    ids = texts(5, seed=2)
    patches = np.random.default_rng(0).normal(size=(5, 4, 48)).astype(np.float32)
    order = [3, 0, 4, 1, 2]
    documents = [described_document(t, i, CONFIG) for t, i in zip(ids, order, strict=True)]
    scores = score_documents(model, documents, patches, batch_tokens=128)
    for t, i, nats, tokens in zip(ids, order, scores.nats, scores.tokens, strict=True):
        logits, cache = model.prefill(np.array([[CONFIG.bos_token_id, CONFIG.boi_token_id]]), np.array([2]))
        model.extend_image(mx.array(patches[i : i + 1]), cache)
        logits = model.extend_text(np.array([[CONFIG.eoi_token_id]]), np.array([1]), cache)
        expected = 0.0
        for target in [*t, CONFIG.eos_token_id]:
            row = np.array(logits[0], np.float64)
            expected += np.log(np.exp(row).sum()) - row[target]
            logits = model.extend_text(np.array([[target]]), np.array([1]), cache)
        assert nats == pytest.approx(expected, rel=1e-4)
        assert tokens == len(t) + 1


def test_a_caption_is_predicted_with_the_boi_that_ends_it(model: Transfusion) -> None:
    scores = score_documents(model, [caption_document([7, 8, 9], CONFIG)])
    assert scores.tokens.tolist() == [4]


def test_summary_of_a_hand_made_score() -> None:
    summary = TextScores(np.array([2 * math.log(4), 2 * math.log(2)]), np.array([2, 2])).summary(6)
    assert summary["perplexity"] == pytest.approx(math.sqrt(8))
    assert summary["nats_per_text"] == pytest.approx(math.log(8))
    assert summary["bits_per_character"] == pytest.approx(1.0)
    # Both draws the better text, or both the worse.
    assert summary["perplexity_interval"] == pytest.approx([2, 4])


# ---- the baselines ----

BOS, EOS, A, B = 1, 2, 3, 4
CORPUS = [np.array([BOS, A, B, EOS]), np.array([BOS, A, A, EOS])]
V = 5


def log_p(model: LanguageModel, previous: int, target: int) -> float:
    return float(model.log_probability(np.array([previous]), np.array([target]))[0])


def test_unigram_by_hand() -> None:
    unigram = Unigram(CORPUS, V, k=0.5)  # six predicted tokens: A three times, EOS twice, B once
    assert log_p(unigram, BOS, A) == pytest.approx(math.log(3.5 / 8.5))
    assert log_p(unigram, A, EOS) == pytest.approx(math.log(2.5 / 8.5))
    assert log_p(unigram, A, 0) == pytest.approx(math.log(0.5 / 8.5))


def test_bigram_by_hand() -> None:
    # Pairs: BOS A twice; A B, B EOS, A A, A EOS once each: five kinds. Predecessors: A 2, B 1, EOS 2.
    bigram = KneserNeyBigram(CORPUS, V, discount=0.5)
    floor = 0.5 * 3 / 5 / V
    q_a, q_b, q_eos = (2 - 0.5) / 5 + floor, (1 - 0.5) / 5 + floor, (2 - 0.5) / 5 + floor
    assert log_p(bigram, BOS, A) == pytest.approx(math.log((2 - 0.5) / 2 + 0.5 * 1 / 2 * q_a))
    assert log_p(bigram, A, B) == pytest.approx(math.log((1 - 0.5) / 3 + 0.5 * 3 / 3 * q_b))
    assert log_p(bigram, A, EOS) == pytest.approx(math.log((1 - 0.5) / 3 + 0.5 * 3 / 3 * q_eos))
    assert log_p(bigram, BOS, B) == pytest.approx(math.log(0.5 * 1 / 2 * q_b))
    assert log_p(bigram, EOS, B) == pytest.approx(math.log(q_b))  # nothing ever followed EOS
    assert log_p(bigram, B, 0) == pytest.approx(math.log(0.5 * 1 / 1 * floor))


@pytest.mark.parametrize("parameter", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("kind", [Unigram, KneserNeyBigram])
def test_probabilities_sum_to_one_after_any_token(
    kind: type[Unigram] | type[KneserNeyBigram], parameter: float
) -> None:
    documents = [np.array([BOS, *np.array(t) % 18 + 5, EOS]) for t in texts(30)]
    fitted = kind(documents, 30, parameter)
    for previous in range(30):
        p = np.exp(fitted.log_probability(np.full(30, previous), np.arange(30)))
        assert p.sum() == pytest.approx(1)
        assert (p > 0).all()


def test_document_nats_split_at_documents() -> None:
    bigram = KneserNeyBigram(CORPUS, V, 0.5)
    both = document_nats(bigram, CORPUS)
    assert both[0] == pytest.approx(-log_p(bigram, BOS, A) - log_p(bigram, A, B) - log_p(bigram, B, EOS))
    assert both[1] == pytest.approx(document_nats(bigram, CORPUS[1:])[0])


def test_bigram_learns_order_and_the_unigram_cannot() -> None:
    rng = np.random.default_rng(3)
    documents = []
    for _ in range(200):
        start = rng.integers(0, 10)
        documents.append(np.array([BOS, *[5 + (start + i) % 10 for i in range(20)], EOS]))
    train, held_out = documents[:160], documents[160:]
    tokens = sum(len(d) - 1 for d in held_out)
    unigram = math.exp(document_nats(fit_unigram(train, 20), held_out).sum() / tokens)
    bigram = math.exp(document_nats(fit_bigram(train, 20), held_out).sum() / tokens)
    assert 9 < unigram < 12  # ten numbers in equal shares, and EOS
    assert bigram < 1.6  # the successor is certain but for the first number and EOS


def test_the_free_number_fits_the_corpus() -> None:
    rng = np.random.default_rng(0)
    every_pair_is_new = [np.array([BOS, *rng.integers(3, 3000, 10), EOS]) for _ in range(100)]
    repeating = [np.array([BOS, 3, 4, 5, 6, EOS])] * 100
    assert fit_bigram(every_pair_is_new, 3000).parameter > fit_bigram(repeating, 3000).parameter
    assert fit_unigram(every_pair_is_new, 3000).parameter > fit_unigram(repeating, 3000).parameter


def test_one_text_is_no_corpus() -> None:
    with pytest.raises(UserError, match="2 or more training texts"):
        fit_bigram(CORPUS[:1], V)
