"""The model of discrete pictures: its passes against each other, against PyTorch, and what it paints."""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from discrete_tools import ColourQuantizer, discrete_config, random_discrete

from mlx_transfusion.code_painting import paint_codes
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.perplexity import (
    caption_document,
    code_scores,
    described_document,
    score_documents,
)
from mlx_transfusion.losses import token_losses
from mlx_transfusion.models.discrete import Discrete
from mlx_transfusion.painting import paint, prefill
from mlx_transfusion.settings import GenerationSettings
from mlx_transfusion.tokenizer import Tokenizer

GREEDY = GenerationSettings(image_temperature=0.0, guidance=1.0)


@pytest.fixture(scope="module", params=["paper", "pre-norm, grouped"])
def model(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> Discrete:
    if request.param == "paper":
        return random_discrete(discrete_config(tiny_tokenizer))
    plain = {"qk_norm": False, "post_norm": False, "num_key_value_heads": 2, "hidden_act": "relu"}
    return random_discrete(discrete_config(tiny_tokenizer, **plain), seed=1)


def whole(model: Discrete, ids: list[int]) -> mx.array:
    """Logits after every token, without a cache: [T, V]."""
    return model.logits(model(mx.array([ids])))[0]


def test_reading_piece_by_piece_is_reading_at_once(model: Discrete) -> None:
    ids = [1, 20, 30, 4, *(model.first_code + np.array([3, 0, 7, 1])).tolist(), 5, 40]
    expected = whole(model, ids)
    cache = model.new_cache(1)
    at = 0
    for end in (3, 4, 5, 8, 9, 10):
        part = np.array([ids[at:end]])
        logits = model.extend_text(part, np.array([end - at]), cache)
        np.testing.assert_allclose(logits[0], expected[end - 1], atol=2e-5)
        at = end


def test_a_picture_is_read_as_its_codes(model: Discrete) -> None:
    codes, other = mx.array([[3, 0, 7, 1]]), mx.array([[3, 0, 7, 2]])
    quantizer = ColourQuantizer()
    model.coder = None
    model.attach(quantizer, None)  # type: ignore[arg-type]
    pixels = model.decode(codes)
    assert pixels.shape == (1, 8, 8, 3)
    assert mx.array_equal(model.encode(pixels), codes)
    cache = prefill(model, [[1]])
    logits = model.read_picture(pixels, cache)[0]
    flat = (codes[0] + model.first_code).tolist()
    np.testing.assert_allclose(logits, whole(model, [1, 4, *flat, 5])[-1], atol=2e-5)
    painted = prefill(model, [[1, 4]])
    model.extend_image(codes, painted)
    one = np.ones(1, int)
    np.testing.assert_allclose(model.extend_text(np.array([[5]]), one, painted)[0], logits, atol=2e-5)
    changed = prefill(model, [[1, 4]])
    model.extend_image(other, changed)
    assert np.abs(np.array(model.extend_text(np.array([[5]]), one, changed)[0] - logits)).max() > 1e-3


def by_hand(model: Discrete, prefix: list[int], scale: float) -> list[int]:
    """Greedy codes by two whole forward passes for each."""
    codes: list[int] = []
    for _ in range(model.config.patches_per_image):
        tail = [model.first_code + c for c in codes]
        logits = [whole(model, [*p, *tail])[-1, model.first_code :] for p in (prefix, [1, 4])]
        codes.append(int(mx.argmax(logits[1] + scale * (logits[0] - logits[1])).item()))
    return codes


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guidance_in_logits_is_two_separate_forwards(model: Discrete, scale: float) -> None:
    prefixes = [[1, 20, 30, 4], [1, 25, 4], [1, 31, 32, 33, 34, 4]]
    settings = dataclasses.replace(GREEDY, guidance=scale)
    painted = paint(model, prefixes, [0, 1, 2], settings)
    assert painted.tolist() == [by_hand(model, prefix, scale) for prefix in prefixes]


def test_a_picture_depends_on_its_own_seed_and_prompt_alone(model: Discrete) -> None:
    prefixes = [[1, 20, 30, 4], [1, 25, 4], [1, 20, 30, 4]]
    settings = GenerationSettings(guidance=2.0, image_top_p=0.9)
    together = paint(model, prefixes, [5, 6, 7], settings).tolist()
    alone = [paint(model, [p], [s], settings).tolist()[0] for p, s in zip(prefixes, (5, 6, 7), strict=True)]
    assert together == alone
    assert together[0] != together[2]


def test_caches_stay_as_they_are(model: Discrete) -> None:
    cache = prefill(model, [[1, 20, 4], [1, 20, 30, 4]])
    guide = model.guide([])
    before = [np.array(part) for layer in (*cache.layers, *guide.layers) for part in layer or ()]
    settings = GREEDY.resolve()
    first = paint_codes(model, cache, [0, 1], settings, guide=guide)
    assert mx.array_equal(first, paint_codes(model, cache, [0, 1], settings, guide=guide))
    after = [np.array(part) for layer in (*cache.layers, *guide.layers) for part in layer or ()]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.lengths.tolist() == [3, 4]


def test_top_p_keeps_the_nucleus(model: Discrete) -> None:
    """With a small nucleus every draw is the likeliest code; with temperature draws follow the distribution."""
    greedy = paint(model, [[1, 20, 4]], [0], GREEDY)
    narrow = dataclasses.replace(GREEDY, image_temperature=1.0, image_top_p=1e-6)
    assert mx.array_equal(greedy, paint(model, [[1, 20, 4]], [9], narrow))
    settings = dataclasses.replace(GREEDY, image_temperature=0.7)
    count = 400
    firsts = np.array(paint(model, [[1, 20, 4]] * count, list(range(count)), settings))[:, 0]
    p = np.array(mx.softmax(whole(model, [1, 20, 4])[-1, model.first_code :] / 0.7))
    seen = np.bincount(firsts, minlength=len(p)) / count
    assert np.abs(seen - p).max() < 4 * math.sqrt(0.25 / count)


def test_progress_tells_the_codes_so_far(model: Discrete) -> None:
    seen: list[tuple[int, int, list[list[int]]]] = []
    codes = paint(
        model, [[1, 20, 4]], [0], GREEDY, callback=lambda k, n, x, x0: seen.append((k, n, x0.tolist()))
    )
    assert [s[:2] for s in seen] == [(k, 4) for k in range(4)]
    assert seen[-1][2] == codes.tolist()
    assert seen[1][2][0][2:] == [0, 0]


def test_what_does_not_fit(tiny_tokenizer: Tokenizer) -> None:
    model = random_discrete(discrete_config(tiny_tokenizer, codebook_size=16, vocab_size=304))
    with pytest.raises(
        UserError, match="its codebook has 8 codes, and the model's vocabulary has places for 16"
    ):
        model.attach(ColourQuantizer(), "autoencoder")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="writes the codes of an autoencoder, and its folder has none"):
        model.decode(mx.zeros((1, 4), mx.int32))
    with pytest.raises(UserError, match="this needs a diffusion model"):
        model.velocity(mx.zeros((1, 4, 1)), mx.zeros(1), model.new_cache(1))
    for change, message in (
        ({"codebook_size": 400}, "codebook_size 400 leaves no text"),
        ({"image_height": 0}, "image_height is 0, expected a positive number"),
        ({"num_attention_heads": 3}, "must be an even multiple"),
        ({"boi_token_id": 290}, "boi_token_id is 290, expected 0 to vocab_size - 1"),
    ):
        with pytest.raises(UserError, match=message):
            discrete_config(tiny_tokenizer, **change)


def test_logits_equal_pytorch(model: Discrete) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from discrete_torch import logits

    ids = [1, 20, 30, 4, *range(model.first_code, model.first_code + 4), 5, 2]
    expected = logits(model, torch.tensor([ids]))
    np.testing.assert_allclose(whole(model, ids), expected[0].numpy(), atol=5e-5)


def test_denominator_loss(tiny_tokenizer: Tokenizer) -> None:
    """d(log Z)^2 / d logit = 2 log Z softmax(logit)."""
    logits = 3 * mx.random.normal((5, 11), key=mx.random.key(0))
    targets = mx.array([0, 3, 10, 3, 7])
    nats, log_z = token_losses(logits, targets)
    reference = -np.log(np.array(mx.softmax(logits, -1)))[np.arange(5), np.array(targets)]
    np.testing.assert_allclose(nats, reference, atol=1e-5)
    gradient = mx.grad(lambda x: token_losses(x, targets)[1].square().sum())(logits)
    np.testing.assert_allclose(gradient, 2 * log_z[:, None] * mx.softmax(logits, -1), rtol=1e-4, atol=1e-5)


def test_losses_that_evaluation_measures(model: Discrete) -> None:
    """Of captions before and behind a picture and of its codes, against a forward pass of each document."""
    c = model.config
    captions, codes = [[20, 30], [25], []], np.array([[3, 0, 7, 1], [1, 1, 2, 5], [0, 6, 4, 4]])

    def nats(ids: list[int], first: int) -> float:
        logits = whole(model, ids)
        losses = token_losses(logits[first - 1 : -1], mx.array(ids[first:]))[0]
        return float(np.array(losses).sum())

    drawn = (codes + c.first_code).tolist()
    behind = [described_document(t, k, c) for k, t in enumerate(captions)]
    found = score_documents(model, behind, codes)
    expected = [nats([1, 4, *p, 5, *t, 2], 7) for t, p in zip(captions, drawn, strict=True)]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-4)
    before = score_documents(model, [caption_document(t, c) for t in captions])
    np.testing.assert_allclose(before.nats, [nats([1, *t, 4], 1) for t in captions], rtol=1e-4)
    painted = code_scores(model, captions, codes, batch_size=2)
    expected = [nats([1, *t, 4, *p], len(t) + 2) for t, p in zip(captions, drawn, strict=True)]
    np.testing.assert_allclose(painted.nats, expected, rtol=1e-4)
    assert painted.tokens.tolist() == [4, 4, 4]
