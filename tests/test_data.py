from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import write_jsonl, write_run

from mlx_transfusion import sequence
from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.sequence import Image, Text
from mlx_transfusion.tokenizer import Tokenizer
from mlx_transfusion.training.config import DataConfig, DiffusionConfig, SourceConfig
from mlx_transfusion.training.data import DataSet, Document, draw_angle, shares

HALF_PI = math.pi / 2
MakeData = Callable[..., DataSet]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_run(folder, tiny_tokenizer)
    write_jsonl(
        folder / "stories.jsonl",
        [
            {
                "segments": [
                    {"text": "red"},
                    {"image": "red-star.png"},
                    {"text": "blue"},
                    {"image": "blue-star.png"},
                ]
            },
            {"segments": [{"image": "red-moon.png"}, {"text": "moon"}]},
            {"segments": [{"image": "red-moon.png"}, {"image": "blue-moon.png"}]},
        ],
    )
    return folder


@pytest.fixture(scope="module")
def make_data(folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> MakeData:
    def make(*files: str, **settings: Any) -> DataSet:
        """`files` with equal weights; settings go to DataConfig, DiffusionConfig or DataSet, whichever has them."""
        weights = settings.pop("weights", [1.0] * len(files))
        images = str(folder / "pictures")
        sources = [SourceConfig(str(folder / f), images, w) for f, w in zip(files, weights, strict=True)]
        diffusion = {
            f.name: settings.pop(f.name) for f in dataclasses.fields(DiffusionConfig) if f.name in settings
        }
        data = {f.name: settings.pop(f.name) for f in dataclasses.fields(DataConfig) if f.name in settings}
        own: dict[str, Any] = {"seed": 0, "sequence_length": 32} | settings
        return DataSet(
            sources,
            DataConfig(tuple(sources), **data),
            DiffusionConfig(**diffusion),
            tiny_config,
            tiny_tokenizer,
            **own,
        )

    return make


def texts(document: Document, tokenizer: Tokenizer) -> list[str]:
    """The texts of a document in their order, with "<image>" for each picture."""
    out = []
    for s in document.segments:
        if isinstance(s, Image):
            out.append("<image>")
        elif decoded := tokenizer.decode([i for i in s.ids if i > 5]):
            out.append(decoded)
    return out


# --- angles ---


def draws(
    config: DiffusionConfig, text_follows: bool = False, progress: float = 0.0, n: int = 20_000
) -> np.ndarray:
    u = np.random.default_rng(0).random((n, 4))
    return np.array([draw_angle(config, row, text_follows, progress) for row in u])


@given(
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4), st.booleans(), st.floats(0, 1),
    st.sampled_from(["uniform", "tan_lognormal"]), st.floats(0, 1), st.floats(0, 1), st.floats(0, HALF_PI),
)  # fmt: skip
def test_every_angle_lies_where_it_may(
    u: tuple[float, ...],
    text_follows: bool,
    progress: float,
    kind: str,
    first: float,
    last: float,
    limit: float,
) -> None:
    config = DiffusionConfig(distribution=kind, high_noise_share=(first, last), image_first_limit=limit)
    angle = draw_angle(config, np.array(u), text_follows, progress)
    assert 0 <= angle <= (limit if text_follows else HALF_PI)


def test_uniform_angles_are_uniform() -> None:
    angles = draws(DiffusionConfig())
    share, _ = np.histogram(angles, 10, (0, HALF_PI))
    np.testing.assert_allclose(share / len(angles), 0.1, atol=0.012)


def test_tan_lognormal_angles() -> None:
    logs = np.log(np.tan(draws(DiffusionConfig(distribution="tan_lognormal", mean=0.3, std=1.3))))
    assert logs.mean() == pytest.approx(0.3, abs=0.04)
    assert logs.std() == pytest.approx(1.3, abs=0.04)
    assert np.mean(logs < 0.3) == pytest.approx(0.5, abs=0.015)
    assert np.mean(np.abs(logs - 0.3) < 1.3) == pytest.approx(0.683, abs=0.015)


def test_a_picture_before_text_stays_below_the_limit() -> None:
    """Table 8: at most step 500 of 1000, whatever the distribution and the high-noise share."""
    config = DiffusionConfig(distribution="tan_lognormal", high_noise_share=(0.9, 0.9))
    angles = draws(config, text_follows=True)
    assert angles.max() <= math.pi / 4
    share, _ = np.histogram(angles, 10, (0, math.pi / 4))
    np.testing.assert_allclose(share / len(angles), 0.1, atol=0.012)


def test_the_high_noise_share_moves_linearly() -> None:
    config = DiffusionConfig(distribution="tan_lognormal", mean=-9.0, high_noise_share=(0.6, 0.2))
    for progress, share in ((0.0, 0.6), (0.25, 0.5), (0.5, 0.4), (1.0, 0.2)):
        angles = draws(config, progress=progress)
        high = angles >= config.high_noise_from
        assert high.mean() == pytest.approx(share, abs=0.012)
        middle = (config.high_noise_from + HALF_PI) / 2
        assert (angles[high] < middle).mean() == pytest.approx(0.5, abs=0.02)


# --- shares ---


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 200))
def test_shares_sum_up_and_stay_within_one_of_their_due(weights: list[float], size: int) -> None:
    due = [weight / sum(weights) * size for weight in weights]
    if sum(max(1, int(x)) for x in due) > size:  # one for each source would be more than there are
        with pytest.raises(UserError, match="too small"):
            shares(weights, size)
        return
    counts = shares(weights, size)
    assert sum(counts) == size
    assert min(counts) >= 1
    assert all(abs(count - max(1, x)) < 1 + 1e-9 for count, x in zip(counts, due, strict=True))


def test_shares_examples() -> None:
    assert shares([3, 1], 80) == [60, 20]
    assert shares([1, 1, 1], 8) in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert shares([1], 5) == [5]
    with pytest.raises(UserError, match="batch_size 1 is too small for 2 sources"):
        shares([1, 1], 1)


# --- documents ---


def test_documents_are_a_function_of_seed_and_step(make_data: MakeData) -> None:
    def key(documents: list[Document]) -> list[tuple]:
        return [(d.segments, [i.name for i in d.images], d.flips, d.angles, d.number) for d in documents]

    a, b = (make_data("pairs.jsonl", "texts.jsonl", flip=0.5) for _ in range(2))
    for step in (0, 1, 7):
        b.documents(step + 20, 6)  # what was asked before does not matter
        assert key(a.documents(step, 6, 0.3)) == key(b.documents(step, 6, 0.3))
    first = key(a.documents(0, 6))
    assert key(a.documents(1, 6)) != first
    assert key(make_data("pairs.jsonl", "texts.jsonl", flip=0.5, seed=1).documents(0, 6)) != first
    assert key(make_data("pairs.jsonl", "texts.jsonl", flip=0.5, stream="valid").documents(0, 6)) != first


def test_no_two_documents_share_draws(make_data: MakeData) -> None:
    data = make_data("pairs.jsonl", "texts.jsonl", caption_first=1.0)
    documents = [d for step in range(10) for d in data.documents(step, 6)]
    assert [d.number for d in documents] == list(range(60))
    angles = [a for d in documents for a in d.angles]
    assert len(set(angles)) == len(angles) == 30
    noises = data.batch(documents).noise
    assert len({n.tobytes() for n in noises}) == len(noises)


def test_an_epoch_visits_every_row_once_in_a_fresh_order(
    make_data: MakeData, tiny_tokenizer: Tokenizer
) -> None:
    data = make_data("pairs.jsonl", "texts.jsonl", weights=[3.0, 1.0], caption_first=0.0)
    names: list[str] = []
    words: list[str] = []
    for step in range(16):  # 6 pairs and 2 texts a step: 6 epochs of 16 pairs, 4 epochs of 8 texts
        documents = data.documents(step, 8)
        assert [len(d.images) for d in documents] == [1] * 6 + [0] * 2
        names += [d.images[0].name for d in documents[:6]]
        words += [texts(d, tiny_tokenizer)[0] for d in documents[6:]]
    for drawn, size in ((names, 16), (words, 8)):
        epochs = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_and_caption_drop_rates(make_data: MakeData, tiny_tokenizer: Tokenizer) -> None:
    data = make_data("pairs.jsonl", caption_first=0.8, caption_drop=0.25)
    documents = [d for step in range(20) for d in data.documents(step, 100)]
    kinds = Counter(
        "dropped" if shown == ["<image>"] else "caption first" if shown[-1] == "<image>" else "image first"
        for shown in (texts(d, tiny_tokenizer) for d in documents)
    )
    for kind, share in (("image first", 0.2), ("dropped", 0.8 * 0.25), ("caption first", 0.8 * 0.75)):
        assert kinds[kind] / len(documents) == pytest.approx(share, abs=0.03)
    for d in documents:
        if texts(d, tiny_tokenizer)[-1] != "<image>":
            assert d.angles[0] <= math.pi / 4
    assert max(a for d in documents for a in d.angles) > 1.5


def test_layouts(make_data: MakeData, tiny_config: ModelConfig) -> None:
    """Caption first: BOS caption BOI . . . . EOI EOS; image first: BOS BOI . . . . EOI caption EOS."""
    n = tiny_config.patches_per_image
    for first in (1.0, 0.0):
        for d in make_data("pairs.jsonl", caption_first=first, caption_drop=0.0).documents(0, 4):
            shape = [s.ids if isinstance(s, Text) else s for s in d.segments]
            caption = shape[1] if first else shape[4]
            assert isinstance(caption, tuple)
            assert len(caption) > 1
            image = [(4,), Image(0, n), (5,)]
            assert shape == ([(1,), caption, *image, (2,)] if first else [(1,), *image, caption, (2,)])
            assert all(s.loss for s in d.segments if isinstance(s, Text))
    for d in make_data("pairs.jsonl", caption_first=1.0, caption_drop=1.0).documents(0, 4):
        assert [s.ids if isinstance(s, Text) else s for s in d.segments] == [
            (1,),
            (4,),
            Image(0, n),
            (5,),
            (2,),
        ]


def test_stories_keep_their_own_order(make_data: MakeData, tiny_tokenizer: Tokenizer) -> None:
    data = make_data("stories.jsonl", caption_first=0.0, caption_drop=1.0)
    seen = {}
    for step in range(30):
        for d in data.documents(step, 3):
            shown = tuple(texts(d, tiny_tokenizer))
            seen[shown] = [i.name for i in d.images]
            assert [s.index for s in d.segments if isinstance(s, Image)] == list(range(len(d.images)))
            followed = [
                any(t != "<image>" for t in shown[k + 1 :]) for k, t in enumerate(shown) if t == "<image>"
            ]
            assert all(a <= math.pi / 4 for a, limited in zip(d.angles, followed, strict=True) if limited)
    assert seen == {
        ("red", "<image>", "blue", "<image>"): ["red-star.png", "blue-star.png"],
        ("<image>", "moon"): ["red-moon.png"],
        ("<image>", "<image>"): ["red-moon.png", "blue-moon.png"],
    }


def test_the_noise_limit_holds_only_where_text_follows(make_data: MakeData) -> None:
    data = make_data("stories.jsonl")
    two = [d.angles for step in range(60) for d in data.documents(step, 3) if len(d.segments) == 10]
    assert len(two) == 60
    assert max(a for a, _ in two) <= math.pi / 4
    assert max(b for _, b in two) > 1.2


def test_long_text_is_cut_and_a_long_caption_is_refused(
    make_data: MakeData, folder: Path, tiny_tokenizer: Tokenizer
) -> None:
    long = "red green blue " * 20
    write_jsonl(folder / "long.jsonl", [{"text": long}])
    data = make_data("long.jsonl")
    (document,) = data.documents(0, 1)
    (cut,) = document.segments
    assert isinstance(cut, Text)
    assert cut.ids == (1, *tiny_tokenizer.encode(long))[:32]
    assert data.count(document) == (31, 0)
    write_jsonl(folder / "wide.jsonl", [{"text": "red"}, {"image": "red-star.png", "text": long}])
    data = make_data("wide.jsonl")
    with pytest.raises(UserError, match=r"wide\.jsonl:2: \d+ tokens do not fit sequence_length 32"):
        data.documents(0, 2)


# --- batches ---


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.integers(3, 12))
def test_count_is_what_pack_finds(make_data: MakeData, step: int, size: int) -> None:
    data = make_data("pairs.jsonl", "texts.jsonl", "stories.jsonl", caption_drop=0.4)
    documents = data.documents(step, size)
    batch = data.batch(documents)
    counts = np.array([data.count(d) for d in documents])
    assert (batch.text_targets, len(batch.angle)) == tuple(counts.sum(0))
    for d, (tokens, images) in zip(documents, counts, strict=True):
        alone = data.batch([d])
        assert (alone.text_targets, len(alone.angle)) == (tokens, images)


def test_a_batch_holds_each_documents_own_pictures_noise_and_angles(
    make_data: MakeData, folder: Path
) -> None:
    from PIL import Image as Pillow

    data = make_data("pairs.jsonl", "stories.jsonl", flip=0.5)
    documents = data.documents(3, 8)
    batch = data.batch(documents)
    m = 0
    flipped = 0
    for d in documents:
        alone = data.batch([d])
        for k, (ref, flip, angle) in enumerate(zip(d.images, d.flips, d.angles, strict=True)):
            pixels = np.asarray(Pillow.open(folder / "pictures" / ref.name))
            np.testing.assert_array_equal(batch.pixels[m], pixels[:, ::-1] if flip else pixels)
            np.testing.assert_array_equal(batch.noise[m], alone.noise[k])
            assert batch.angle[m] == np.float32(angle)
            m += 1
            flipped += flip
    assert m == len(batch.pixels) == len(batch.noise) == len(batch.angle)
    assert 0 < flipped < m
    assert sorted(batch.packed.image[batch.packed.image >= 0]) == sorted(list(range(m)) * 4)
    assert abs(batch.noise.std() - 1) < 0.1


def test_a_batch_of_text_has_no_pictures(make_data: MakeData) -> None:
    data = make_data("texts.jsonl")
    batch = data.batch(data.documents(0, 3))
    assert batch.pixels.shape == batch.noise.shape == (0, 8, 8, 3)
    assert batch.angle.shape == (0,)
    assert batch.text_targets > 0


def test_flip_rate(make_data: MakeData) -> None:
    data = make_data("pairs.jsonl", flip=0.3)
    flips = [f for step in range(10) for d in data.documents(step, 100) for f in d.flips]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.05)
    assert not any(f for d in make_data("pairs.jsonl").documents(0, 50) for f in d.flips)


def test_bad_rows_stop_or_are_counted(make_data: MakeData, folder: Path) -> None:
    write_jsonl(folder / "bad.jsonl", [{"text": "red"}, {"image": "nowhere.png", "text": "x"}, {"txt": "y"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2: .*nowhere\.png"):
        make_data("bad.jsonl")
    data = make_data("bad.jsonl", skip_bad_rows=True)
    assert [len(rows) for rows in data.rows] == [1]
    assert len(data.bad_rows) == 2
    assert "bad.jsonl:3: " in data.bad_rows[1]


def test_latent_presets_are_not_trained_on_pixels(
    make_data: MakeData, folder: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    config = dataclasses.replace(tiny_config, image_channels=8, image_mean=(0.0,) * 8)
    source = SourceConfig(str(folder / "pairs.jsonl"), str(folder / "pictures"))
    with pytest.raises(UserError, match=r"image_channels is 8, and pictures have 3.*data\.latents"):
        DataSet(
            [source],
            DataConfig((source,)),
            DiffusionConfig(),
            config,
            tiny_tokenizer,
            seed=0,
            sequence_length=32,
        )


def test_valid_and_train_never_share_noise(make_data: MakeData) -> None:
    a, b = make_data("pairs.jsonl"), make_data("pairs.jsonl", stream="valid")
    one, two = a.batch(a.documents(0, 4)), b.batch(b.documents(0, 4))
    assert not {n.tobytes() for n in one.noise} & {n.tobytes() for n in two.noise}
    assert one.packed.ids.shape[0] % 4 == 0
    assert sequence.attention_mask(one.packed.document, one.packed.image).any(-1).all()
