"""Painting and writing: the cache against a full pass, pictures by their own seed alone, the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from full_forward import Double
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mlx_transfusion import interleave, sequence, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Finished, Painted, Step, Token
from mlx_transfusion.generation import complete, describe, generate_images, paint
from mlx_transfusion.model_io import Loaded, load
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.transfusion import TrainArrays, Transfusion
from mlx_transfusion.painting import padded, paint_after, prefill
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.text_stream import TextStream
from mlx_transfusion.tokenizer import Tokenizer

FEW = GenerationSettings(steps=4)
SAMPLERS = ["ddim", "ddpm", "heun", "midpoint", "dpmpp_2m"]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> Loaded:
    return load(tiny_model_dir)


def random_patches(model: Transfusion, count: int, seed: int = 0) -> mx.array:
    c = model.config
    return mx.random.normal((count, c.patches_per_image, c.patch_dim), key=mx.random.key(seed))


# ---- the cache ----


def full_pass(
    model: Transfusion, rows: Sequence[Sequence[list[int] | None]], patches: mx.array, angles: Sequence[float]
) -> tuple[np.ndarray, mx.array]:
    """Logits at every position [B, T, V] and predictions [M, N, P] of rows of texts and images, in one pass.

    None stands for the next image of `patches` [M, N, P]; every row has equally many.
    """
    n = model.config.patches_per_image
    count = len(patches) // len(rows)
    documents = []
    for row in rows:
        numbers = iter(range(count))
        documents.append(
            [sequence.Image(next(numbers), n) if s is None else sequence.Text(tuple(s)) for s in row]
        )
    longest = max(map(sequence.length, documents))
    packed = [sequence.pack([d], longest) for d in documents]
    is_image = np.concatenate([r.modality for r in packed]) == sequence.IMAGE
    patch_row = np.concatenate([r.patch_row + i * count * n for i, r in enumerate(packed)]) * is_image
    patch_index = np.zeros(is_image.sum(), np.int32)
    patch_index[patch_row[is_image]] = np.flatnonzero(is_image)
    mask = [sequence.attention_mask(r.document, r.image) for r in packed]
    logits, predictions = model(
        TrainArrays(
            ids=mx.array(np.concatenate([r.ids for r in packed])),
            is_image=mx.array(is_image[..., None]),
            patch_row=mx.array(patch_row),
            patch_index=mx.array(patch_index),
            text_index=mx.arange(is_image.size),
            mask=mx.array(np.concatenate(mask)),
            patches=patches,
            angle=mx.array(list(angles)),
        )
    )
    return np.array(logits).reshape(*is_image.shape, -1), predictions


def test_cached_equals_recomputed(any_model: Transfusion) -> None:
    """Text, image, text, image, text in three rows of different lengths, and a noisy third image."""
    n = any_model.config.patches_per_image
    images = random_patches(any_model, 9)  # three of each row
    texts = [  # of the three rows; the last token of each is BOI
        ([1, 10, 4], [1, 11, 12, 13, 14, 4], [1, 15, 16, 4]),
        ([5, 17, 18, 19, 4], [5, 4], [5, 20, 4]),
        ([5, 4], [5, 21, 4], [5, 22, 23, 24, 25, 4]),
    ]
    angle = [0.9, 0.4, 1.3]
    rows = [[texts[0][r], None, texts[1][r], None, texts[2][r], None] for r in range(3)]
    angles = [a for r in range(3) for a in (0.0, 0.0, angle[r])]
    logits, predictions = full_pass(any_model, rows, images, angles)
    noisy, expected = images[2::3], predictions[2::3]
    if any_model.config.prediction == "epsilon":
        expected = trigflow.velocity_from_eps(noisy, expected, mx.array(angle)[:, None, None])

    cache = KVCache(any_model.config.num_hidden_layers, 3)
    ends = np.zeros(3, int)
    for turn in range(3):
        ids, lengths = padded(texts[turn], 0)
        cached = any_model.extend_text(ids, lengths, cache)
        ends += lengths
        np.testing.assert_allclose(np.array(cached), logits[np.arange(3), ends - 1], atol=1e-4)
        if turn < 2:
            any_model.extend_image(images[turn::3], cache)
            ends += n
    velocity = any_model.velocity(noisy, mx.array(angle), cache)
    np.testing.assert_allclose(np.array(velocity), np.array(expected), atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, ends)


def test_token_by_token_equals_at_once(any_model: Transfusion) -> None:
    at_once, _ = any_model.prefill(np.array([[1, 10, 11, 12, 13]]), np.array([5]))
    cache = KVCache(any_model.config.num_hidden_layers, 1)
    for token in (1, 10, 11, 12, 13):
        one_by_one = any_model.extend_text(np.array([[token]]), np.array([1]), cache)
    np.testing.assert_allclose(np.array(one_by_one), np.array(at_once), atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_painting_equals_painting_with_full_passes(any_model: Transfusion, sampler: str) -> None:
    """The whole guided run: every velocity from passes over the full sequence gives the same picture."""

    class Uncached(Double):
        def velocity(self, x: mx.array, angle: mx.array, cache: KVCache) -> mx.array:
            prefixes = [[1, 10, 11, 12, 4], [1, 13, 4], [1, 4], [1, 4]][: len(x)]
            angles = [float(a) for a in np.array(angle)]
            out = full_pass(any_model, [[ids, None] for ids in prefixes], x, angles)[1]
            if self.config.prediction == "epsilon":
                return trigflow.velocity_from_eps(x, out, angle[:, None, None])
            return out

    run = dataclasses.replace(FEW, sampler=sampler)
    prefixes, seeds = [[1, 10, 11, 12, 4], [1, 13, 4]], [3, 4]
    expected = paint(Uncached(any_model), prefixes, seeds, run)  # type: ignore[arg-type]
    got = paint(any_model, prefixes, seeds, run)
    scale = float(mx.abs(expected).max())
    np.testing.assert_allclose(np.array(got) / scale, np.array(expected) / scale, atol=1e-4)


def test_painting_leaves_the_cache_as_it_was(tiny_model: Transfusion) -> None:
    cache = prefill(tiny_model, [[1, 10, 11, 4]])
    before = [np.array(k) for pair in cache.layers if pair for k in pair]
    first = paint_after(tiny_model, cache, [1], FEW.resolve())
    again = paint_after(tiny_model, cache, [1], FEW.resolve())
    np.testing.assert_array_equal(np.array(first), np.array(again))
    assert list(cache.lengths) == [4]
    for was, now in zip(before, (k for pair in cache.layers if pair for k in pair), strict=True):
        np.testing.assert_array_equal(was, np.array(now))


# ---- seeds and batches ----

PREFIXES = [[1, 10, 11, 12, 4], [1, 13, 4], [1, 14, 15, 16, 17, 18, 4], [1, 13, 4], [1, 10, 11, 12, 4]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_its_own_seed_and_prompt_only(any_model: Transfusion, sampler: str) -> None:
    run = dataclasses.replace(FEW, sampler=sampler)
    seeds = [5, 6, 7, 8, 9]
    together = np.array(any_model.decode(paint(any_model, PREFIXES, seeds, run)))
    for i, (prefix, seed) in enumerate(zip(PREFIXES, seeds, strict=True)):
        alone = np.array(any_model.decode(paint(any_model, [prefix], [seed], run)))
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)
    assert np.abs(together[0] - together[4]).max() > 0.01  # same prompt, other seed
    other_prompt = np.array(any_model.decode(paint(any_model, [PREFIXES[1]], [5], run)))
    assert np.abs(together[0] - other_prompt[0]).max() > 1e-4


def test_batch_size_does_not_change_which_seed_belongs_to_which_picture(loaded: Loaded) -> None:
    prompts = ["red heart", "blue star cat", "red heart", "moon", "happy dog"]
    seeds = [3, 1, 4, 1, 5]
    expected = generate_images(loaded, prompts, seeds, FEW)
    assert [(i.prompt, i.seed, i.index) for i in expected] == list(zip(prompts, seeds, range(5), strict=True))
    for size in (2, 3, 16):
        got = generate_images(loaded, prompts, seeds, dataclasses.replace(FEW, batch_size=size))
        for a, b in zip(expected, got, strict=True):
            assert (a.prompt, a.seed, a.index) == (b.prompt, b.seed, b.index)
            assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 1


def test_a_row_of_a_batch_repeats_to_the_last_bit(tiny_model: Transfusion) -> None:
    """What `generate --from` does: the same shape and the same row, whatever the other rows are."""
    prefixes = [[1, 10, 4], [1, 11, 4], [1, 12, 4], [1, 10, 4], [1, 14, 4]]
    batch = np.array(paint(tiny_model, prefixes, [1, 2, 3, 4, 5], FEW))
    for row in range(5):
        copies = np.array(paint(tiny_model, [prefixes[row]] * 5, [row + 1] * 5, FEW))
        np.testing.assert_array_equal(copies[row], batch[row])


def test_one_prompt_and_several_seeds_and_the_other_way_round(loaded: Loaded) -> None:
    images = generate_images(loaded, "red heart", [1, 2], FEW)
    assert [(i.prompt, i.seed) for i in images] == [("red heart", 1), ("red heart", 2)]
    images = generate_images(loaded, ["moon", "star"], 7, FEW)
    assert [(i.prompt, i.seed) for i in images] == [("moon", 7), ("star", 7)]
    assert images[0].pixels.shape == (8, 8, 3)
    assert images[0].pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        (["a", "b", "c"], [1, 2], "3 prompts and 2 seeds"),
        ([], [1], "nothing to paint"),
        ("moon", -1, "seed -1 is out of range"),
        ("moon", 1 << 64, "out of range"),
        ("", 1, "the prompt is empty"),
        ("  ", 1, "the prompt is empty"),
        ("cat " * 80, 1, "the prompt is too long"),
    ],
)
def test_bad_requests(loaded: Loaded, prompts: str | list[str], seeds: int | list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_images(loaded, prompts, seeds, FEW)


def test_longest_prompt_fits(loaded: Loaded) -> None:
    word = loaded.tokenizer.encode("cat")
    room = loaded.config.max_position - loaded.config.patches_per_image - 4
    prompt = " ".join(["cat"] * (room // len(word)))
    assert len(loaded.tokenizer.encode(prompt)) <= room
    assert len(generate_images(loaded, prompt, 1, FEW)) == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights_paint_about_the_same(
    loaded: Loaded, tiny_model_dir: Path, dtype: mx.Dtype
) -> None:
    half = load(tiny_model_dir, dtype=dtype)
    plain = dataclasses.replace(FEW, guidance=1.0)
    expected = generate_images(loaded, "red heart", 1, plain)[0].pixels.astype(int)
    got = generate_images(half, "red heart", 1, plain)[0].pixels
    assert np.abs(got - expected).mean() < (2 if dtype == mx.float16 else 8)
    events = list(complete(half, ["red", got, "cat"], 1, dataclasses.replace(FEW, max_tokens=8)))
    assert isinstance(events[-1], Finished)


# ---- guidance ----


def test_guidance(tiny_model: Transfusion) -> None:
    prefix = [[1, 10, 11, 4]]

    def run(negative: list[int] | None = None, **change: object) -> np.ndarray:
        chosen = dataclasses.replace(FEW, **change)  # type: ignore[arg-type]
        return np.array(paint(tiny_model, prefix, [1], chosen, negative_ids=negative))

    plain = run(guidance=1.0)
    assert np.abs(run(guidance=3.0) - plain).max() > 1e-3
    # Away from the very same prompt leads nowhere; neither does guidance on no angle.
    np.testing.assert_allclose(run(prefix[0], guidance=3.0), plain, atol=1e-4)
    np.testing.assert_allclose(run(guidance=3.0, guidance_interval=(0.0, 0.0)), plain, atol=1e-4)
    # A scale of 0 is the unconditional picture.
    unconditional = np.array(paint(tiny_model, [[1, 4]], [1], dataclasses.replace(FEW, guidance=1.0)))
    np.testing.assert_allclose(run(guidance=0.0), unconditional, atol=1e-4)
    assert np.abs(run([1, 12, 4], guidance=3.0) - run(guidance=3.0)).max() > 1e-3


def test_guided_steps_cost_two_rows_and_others_one(tiny_model: Transfusion) -> None:
    rows: list[int] = []

    class Counting(Double):
        def velocity(self, x: mx.array, angle: mx.array, cache: KVCache) -> mx.array:
            rows.append(len(x))
            return tiny_model.velocity(x, angle, cache)

    middle = dataclasses.replace(
        FEW, sampler="ddim", guidance_interval=(0.5, 1.3)
    )  # of pi/2, 3/8, 1/4, 1/8 pi
    paint(Counting(tiny_model), [[1, 10, 4]], [1], middle)  # type: ignore[arg-type]
    assert rows == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "dpmp_2m"}, "did you mean 'dpmpp_2m'"),
        ({"sampler": ""}, "unknown sampler ''"),
        ({"steps": 0}, "steps is 0"),
        ({"angles": (1.1, 1.2)}, "angles 1.1,1.2: use radians that decrease"),
        ({"angles": (1.6,)}, "angles 1.6: use radians"),
        ({"angles": (0.0,)}, "angles 0: use radians"),
        ({"angles": (float("nan"),)}, "angles nan: use radians"),
        ({"angles": (1.1,), "steps": 3}, "1 angles make 2 steps, and steps is 3"),
        ({"angles": (1.1,), "sampler": "ddim"}, "angles are for sampler 'consistency', this is 'ddim'"),
        ({"sampler": "consistency", "spacing": "karras"}, "spacing 'karras' is for diffusion samplers"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance_interval": (1.0, 0.5)}, "guidance interval"),
        ({"spacing": "karas"}, "did you mean 'karras'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_images": -1}, "max_images is -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": ("",)}, "stop text is empty"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(DEFAULTS, **change).check()  # type: ignore[arg-type]


# ---- steps ----


def test_every_step_is_reported_with_a_preview(loaded: Loaded) -> None:
    steps: list[Step] = []
    previews = []

    def on_step(step: Step) -> None:
        steps.append(step)
        previews.append(step.preview())

    chosen = dataclasses.replace(FEW, batch_size=2)
    images = generate_images(loaded, ["red heart", "moon cat"], [1, 2], chosen, on_step)
    assert [(s.step, s.steps) for s in steps[:4]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(i for s in steps if s.step == 1 for i in s.indices) == [0, 1]
    assert previews[3].dtype == np.uint8
    # At the last step the estimate is the picture.
    np.testing.assert_array_equal(previews[3][0], images[steps[3].indices[0]].pixels)


# ---- text and pictures in one stream ----


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """`script(ids)`: the model "samples" these tokens, then EOS."""

    def install(ids: Sequence[int]) -> None:
        tokens: Iterator[int] = iter([*ids, 2])
        monkeypatch.setattr(interleave, "sample_token", lambda logits, **_: next(tokens))
        monkeypatch.setattr(interleave, "likeliest", lambda *_: (mx.array([next(tokens)]), mx.zeros(1)))

    return install


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interleaved_loop_equals_a_full_pass(
    loaded: Loaded,
    script: Callable[[Sequence[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    """The logits after text, image, text, image, text are those of one pass over the document it made.

    The likeliest tokens (temperature 0) are read ahead, EOS too.
    """
    painted: list[mx.array] = []

    def spy(*args: object, **kwargs: object) -> mx.array:
        painted.append(paint_after(*args, **kwargs))  # type: ignore[arg-type]
        return painted[-1]

    monkeypatch.setattr(interleave, "paint_after", spy)
    cat, dog, moon = (loaded.tokenizer.encode(word) for word in ("cat", "dog", "moon"))
    script([*cat, 4, *dog, 4, *moon])
    settings = dataclasses.replace(FEW, temperature=temperature).resolve()
    document = interleave._Document(loaded, ["red heart"], 3, settings, None)
    events = list(document.run())
    kinds = [type(e).__name__ for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == [
        "Token", "Painted", "Token", "Painted", "Token", "Finished"
    ]  # fmt: skip
    texts = "".join(e.text if isinstance(e, Token) else "|" for e in events)
    assert texts == " cat|dog|moon|"
    assert [e.image.index for e in events if isinstance(e, Painted)] == [0, 1]

    prompt = loaded.tokenizer.encode("red heart")
    row = [[1, *prompt, *cat, 4], None, [5, *dog, 4], None, [5, *moon, *([] if temperature else [2])]]
    logits, _ = full_pass(loaded.model, [row], mx.concatenate(painted), [0.0, 0.0])
    np.testing.assert_allclose(np.array(document.logits)[0], logits[0, -1], atol=1e-4)


def test_pictures_of_a_completion(loaded: Loaded, script: Callable[[Sequence[int]], None]) -> None:
    steps: list[Step] = []
    script([4, 4])
    events = list(complete(loaded, "red heart", 3, FEW, steps.append))
    first, second = (e.image for e in events if isinstance(e, Painted))
    assert events[-1] == Finished("stop")
    assert np.abs(first.pixels.astype(int) - second.pixels).max() > 3  # each has noise of its own
    assert [s.step for s in steps] == [1, 2, 3, 4] * 2
    assert [s.indices for s in steps[::4]] == [[0], [1]]
    # The picture right after the prompt is the one that `generate` paints.
    alone = generate_images(loaded, "red heart", 3, FEW)[0]
    assert np.abs(alone.pixels.astype(int) - first.pixels).max() <= 1


def test_a_completion_stays_inside_its_limits(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    banned: list[set[int]] = []

    def paint_if_possible(logits: mx.array, *, banned: list[int], **_: object) -> int:
        record.append(set(banned))
        return 10 if 4 in banned else 4

    record = banned
    monkeypatch.setattr(interleave, "sample_token", paint_if_possible)
    chosen = dataclasses.replace(FEW, max_images=100, max_tokens=1000, temperature=1)
    document = interleave._Document(loaded, ["red heart"], 1, chosen.resolve(), None)
    events = list(document.run())
    assert events[-1] == Finished("length")
    assert int(document.cache.lengths[0]) <= loaded.config.max_position
    assert sum(isinstance(e, Painted) for e in events) >= 5
    assert all({0, 1, 3, 5} <= b for b in banned)
    two = dataclasses.replace(FEW, max_images=2, max_tokens=5, temperature=1)
    events = list(complete(loaded, "red heart", 1, two))
    assert sum(isinstance(e, Painted) for e in events) == 2
    assert events[-1] == Finished("length")


def test_stop_texts(loaded: Loaded, script: Callable[[Sequence[int]], None]) -> None:
    script([*loaded.tokenizer.encode("cat dog moon"), 4])
    events = list(complete(loaded, "red", 1, dataclasses.replace(FEW, stop=("og m",))))
    assert "".join(e.text for e in events if isinstance(e, Token)).strip() == "cat d"
    assert events[-1] == Finished("stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_repetition_penalty_counts_prompt_and_text(loaded: Loaded, temperature: float) -> None:
    chosen = dataclasses.replace(
        DEFAULTS, temperature=temperature, repetition_penalty=1e6, max_tokens=30, max_images=0
    )
    written = loaded.tokenizer.encode("red heart")
    for event in complete(loaded, "red heart", 1, chosen):
        written += event.ids if isinstance(event, Token) else ()
    assert len(written) > 10
    assert len(set(written)) == len(written)
    plain = complete(loaded, "red heart", 1, dataclasses.replace(chosen, temperature=0, repetition_penalty=1))
    ids = [i for event in plain if isinstance(event, Token) for i in event.ids]
    assert len(set(ids)) < len(ids)


def test_text_depends_on_its_seed_only(loaded: Loaded) -> None:
    chosen = dataclasses.replace(DEFAULTS, temperature=1.5, max_tokens=12, max_images=0)

    def text(seed: int) -> str:
        return "".join(e.text for e in complete(loaded, "red heart", seed, chosen) if isinstance(e, Token))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_describe(loaded: Loaded) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    chosen = dataclasses.replace(DEFAULTS, max_tokens=6)
    text = describe(loaded, pixels, settings=chosen)
    assert text == describe(loaded, pixels, seed=9, settings=chosen)  # greedy
    # The same, by hand: BOS BOI image EOI, then the likeliest text token each time.
    cache = prefill(loaded.model, [[1, 4]])
    loaded.model.extend_image(loaded.model.encode(mx.array(pixels[None] / np.float32(255))), cache)
    logits = loaded.model.extend_text(np.array([[5]]), np.array([1]), cache)
    ids: list[int] = []
    while len(ids) < 6:
        scores = np.array(logits[0])
        scores[[0, 1, 3, 4, 5]] = -np.inf
        token = int(scores.argmax())
        if token == 2:
            break
        ids.append(token)
        logits = loaded.model.extend_text(np.array([[token]]), np.array([1]), cache)
    assert ids
    assert text == loaded.tokenizer.decode(ids).strip()


def test_prompts_that_cannot_be_completed(loaded: Loaded) -> None:
    for prompt, message in (("", "empty"), ("cat " * 90, "too long")):
        with pytest.raises(UserError, match=message):
            list(complete(loaded, prompt))
    with pytest.raises(UserError, match="out of range"):
        complete(loaded, "cat", seed=-1)


def test_bad_input_is_found_before_the_first_event(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="empty"):
        complete(loaded, "")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="catdog heart\u00e9\U0001f600\u4e2d", max_size=24),
    stop=st.lists(st.text(alphabet="catdo h\u00e9", min_size=1, max_size=3), max_size=2),
)
def test_streamed_text_equals_the_text_at_once(tiny_tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    assume(
        not any(a != b and a in b for a in stop for b in stop)
    )  # the inner one ends the text before the outer
    ids = tiny_tokenizer.encode(text)
    stream = TextStream(tiny_tokenizer, stop=stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    whole = tiny_tokenizer.decode(ids)
    cut = min([at for s in stop if (at := whole.find(s)) >= 0], default=len(whole))
    assert "".join(piece for piece, _ in pieces) == whole[:cut]
    assert not any("\ufffd" in piece for piece, _ in pieces)
    if not stop:
        assert [i for _, used in pieces for i in used] == ids[: sum(len(used) for _, used in pieces)]


def test_a_stream_continues_the_text_before_it(tiny_tokenizer: Tokenizer) -> None:
    stream = TextStream(tiny_tokenizer, tiny_tokenizer.encode("red"))
    pieces = [stream.push(token)[0] for token in tiny_tokenizer.encode("heart")]
    assert "".join(pieces) == " heart"


def test_a_family_may_guide_in_its_own_way(tiny_model: Transfusion) -> None:
    class Unmoved(Double):
        def guided(
            self, conditional: mx.array, unconditional: mx.array, scale: float, *_: object
        ) -> mx.array:
            return conditional

    prefixes, seeds = [[1, 10, 4]], [1]
    got = paint(Unmoved(tiny_model), prefixes, seeds, FEW)  # type: ignore[arg-type]
    expected = paint(tiny_model, prefixes, seeds, dataclasses.replace(FEW, guidance=1.0))
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-5)
    assert not np.allclose(np.array(paint(tiny_model, prefixes, seeds, FEW)), np.array(expected), atol=1e-3)
