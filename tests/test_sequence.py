from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_transfusion.config import ModelConfig
from mlx_transfusion.errors import UserError
from mlx_transfusion.sequence import (
    IMAGE,
    PAD,
    TEXT,
    Image,
    PackedBatch,
    Segment,
    Text,
    attention_mask,
    bucket,
    document,
    first_fit,
    length,
    pack,
)  # fmt: skip

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
    image_height=4, image_width=4, patch_size=2,
)  # fmt: skip
PATCHES = CONFIG.patches_per_image
ROW = 40

# One position of a document, as the words of the rules describe it.
Token = tuple[str, int, int, bool]  # role, token id or patch place, image (-1: none), may it be a target?


def written_out(segments: list[Segment]) -> list[Token]:
    """The slow way to say what a document looks like: BOS, text, BOI patches EOI, ..., EOS."""
    tokens: list[Token] = [("bos", CONFIG.bos_token_id, -1, True)]
    for s in segments:
        if isinstance(s, Text):
            tokens += [("text", i, -1, s.loss) for i in s.ids]
        else:
            tokens.append(("boi", CONFIG.boi_token_id, -1, True))
            tokens += [("patch", k, s.index, False) for k in range(s.patches)]
            tokens.append(("eoi", CONFIG.eoi_token_id, -1, True))
    return [*tokens, ("eos", CONFIG.eos_token_id, -1, True)]


def predictions(tokens: list[Token]) -> set[tuple[int, int]]:
    """(position, target) of the language-model loss: every token predicts its successor, but BOI and patches."""
    return {
        (p, tokens[p + 1][1])
        for p in range(len(tokens) - 1)
        if tokens[p][0] not in ("boi", "patch") and tokens[p + 1][3]
    }


@st.composite
def drawn_documents(draw: st.DrawFn) -> list[list[Segment]]:
    images = iter(range(1000))
    text = st.builds(
        lambda ids, loss: Text(tuple(ids), loss),
        st.lists(st.integers(6, 63), min_size=1, max_size=6),
        st.booleans(),
    )
    kinds = st.lists(st.one_of(text, st.none()), max_size=4)  # None stands for an image
    drawn = draw(st.lists(kinds, min_size=1, max_size=6))
    return [[Image(next(images), PATCHES) if s is None else s for s in d] for d in drawn]


def runs(packed: PackedBatch) -> Iterator[tuple[int, int, int]]:
    """(row, first column, end) of every document that the arrays show."""
    for r, row in enumerate(packed.document):
        for d in range(int(row.max()) + 1):
            columns = np.flatnonzero(row == d)
            assert (np.diff(columns) == 1).all()
            yield r, int(columns[0]), int(columns[-1]) + 1


@settings(deadline=None)
@given(drawn_documents(), st.integers(1, 3), st.integers(1, 9))
def test_every_array_says_what_the_documents_say(
    documents: list[list[Segment]], row_multiple: int, text_multiple: int
) -> None:
    packed = pack(
        [document(d, CONFIG) for d in documents], ROW, row_multiple=row_multiple, text_multiple=text_multiple
    )
    rows = len(packed.ids)
    assert rows % row_multiple == 0
    real = packed.text_weight == 1
    assert (packed.text_weight[~real] == 0).all()
    assert (packed.text_index[~real] == 0).all()
    assert len(real) % text_multiple == 0
    assert len(real) - real.sum() < text_multiple or real.sum() == 0
    targets = dict(zip(packed.text_index[real].tolist(), packed.text_target[real].tolist(), strict=True))
    assert len(targets) == real.sum()  # no position twice

    found = []
    for r, start, end in runs(packed):
        assert packed.position[r, start:end].tolist() == list(range(end - start))
        tokens = []
        for c in range(start, end):
            if packed.modality[r, c] == IMAGE:
                image, place = divmod(int(packed.patch_row[r, c]), PATCHES)
                assert packed.image[r, c] == image
                assert packed.ids[r, c] == CONFIG.pad_token_id
                tokens.append((place, image))
            else:
                assert packed.modality[r, c] == TEXT
                assert packed.image[r, c] == -1
                tokens.append((int(packed.ids[r, c]), -1))
        pairs = {(c - start, targets.pop(r * ROW + c)) for c in range(start, end) if r * ROW + c in targets}
        found.append((tuple(tokens), frozenset(pairs)))
    assert not targets  # nothing is predicted in padding

    wanted = []
    for d in documents:
        tokens = written_out(d)
        wanted.append((tuple((i, image) for _, i, image, _ in tokens), frozenset(predictions(tokens))))
    assert Counter(found) == Counter(wanted)
    padding = packed.document == -1
    for array, value in ((packed.ids, CONFIG.pad_token_id), (packed.modality, PAD), (packed.image, -1),
                         (packed.position, 0), (packed.patch_row, 0)):  # fmt: skip
        assert (array[padding] == value).all()
    assert packed.tokens == sum(len(written_out(d)) for d in documents)


@settings(deadline=None)
@given(drawn_documents())
def test_patch_row_and_patch_index_are_inverse(documents: list[list[Segment]]) -> None:
    packed = pack([document(d, CONFIG) for d in documents], ROW, row_multiple=2)
    places = np.flatnonzero(packed.modality == IMAGE)
    assert sorted(packed.patch_row.reshape(-1)[places]) == list(range(len(places)))
    assert (packed.patch_index[packed.patch_row.reshape(-1)[places]] == places).all()
    assert len(packed.patch_index) == len(places)


@settings(deadline=None, max_examples=40)
@given(drawn_documents())
def test_mask_is_the_rule_in_words(documents: list[list[Segment]]) -> None:
    packed = pack([document(d, CONFIG) for d in documents], ROW, row_multiple=2)
    mask = attention_mask(packed.document, packed.image)
    assert mask.shape == (len(packed.ids), 1, ROW, ROW)
    assert mask.dtype == bool
    for r in range(len(mask)):
        for i in range(ROW):
            for j in range(ROW):
                if packed.modality[r, i] == PAD or packed.modality[r, j] == PAD:
                    sees = i == j  # padding sees itself, so that no row of the softmax is empty
                elif packed.document[r, i] != packed.document[r, j]:
                    sees = False
                elif packed.modality[r, i] == IMAGE and packed.image[r, i] == packed.image[r, j]:
                    sees = True
                else:
                    sees = j <= i
                assert mask[r, 0, i, j] == sees, (r, i, j)
    assert mask.any(-1).all()


def test_the_text_loss_of_one_row_by_hand() -> None:
    """BOS a b BOI . . . . EOI c EOS: BOI and the patches predict nothing, EOI is no target but predicts c."""
    segments = [Text((10, 11)), Image(0, PATCHES), Text((12,))]
    packed = pack([document(segments, CONFIG)], 16, text_multiple=4)
    assert packed.ids[0].tolist() == [1, 10, 11, 4, 0, 0, 0, 0, 5, 12, 2, 0, 0, 0, 0, 0]
    assert packed.text_index.tolist() == [0, 1, 2, 8, 9, 0, 0, 0]
    assert packed.text_target.tolist() == [10, 11, 4, 12, 2, 0, 0, 0]
    assert packed.text_weight.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_text_without_loss_stays_in_the_context() -> None:
    packed = pack([document([Text((10, 11), loss=False), Text((12,))], CONFIG)], 8, text_multiple=1)
    assert packed.ids[0].tolist() == [1, 10, 11, 12, 2, 0, 0, 0]
    assert packed.text_target.tolist() == [12, 2]
    assert packed.text_index.tolist() == [2, 3]


def test_the_last_token_of_a_document_does_not_predict_the_next_document() -> None:
    packed = pack([document([Text((10,))], CONFIG), document([Text((11,))], CONFIG)], 6, text_multiple=1)
    assert packed.ids.tolist() == [[1, 10, 2, 1, 11, 2]]
    assert packed.text_index.tolist() == [0, 1, 3, 4]


def test_adjacent_images_of_one_document_see_each_other_only_backwards() -> None:
    packed = pack([document([Image(0, PATCHES), Image(1, PATCHES)], CONFIG)], 16)
    mask = attention_mask(packed.document, packed.image)[0, 0]
    first, second = slice(2, 6), slice(8, 12)
    assert mask[first, first].all()
    assert mask[second, second].all()
    assert mask[second, first].all()
    assert not mask[first, second].any()


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=25), st.integers(20, 40))
def test_first_fit(lengths: list[int], row_length: int) -> None:
    rows = first_fit(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < f <= row_length for f in fill)
    assert first_fit(list(lengths), row_length) == rows
    # What opened a row had found no room before it, and nothing leaves a row: two rows never fit into one.
    assert all(a + b > row_length for k, b in enumerate(fill) for a in fill[:k])
    # Longest first, so every row is in falling order.
    assert all(lengths[row[k]] >= lengths[row[k + 1]] for row in rows for k in range(len(row) - 1))


def test_first_fit_of_equal_lengths_keeps_their_order() -> None:
    assert first_fit([3, 5, 3, 3, 5], 8) == [[1, 0], [4, 2], [3]]


@pytest.mark.parametrize("ids", [38, 39, 100])
def test_a_document_that_does_not_fit_is_refused(ids: int) -> None:
    long = document([Text((7,) * ids)], CONFIG)
    if ids == 38:
        assert pack([long], ROW).ids.shape == (1, ROW)
        return
    with pytest.raises(UserError, match=f"document of {ids + 2} tokens does not fit a sequence of {ROW}"):
        pack([[Text((7,))], long], ROW)


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_bucket_is_the_next_multiple_and_never_zero(n: int, multiple: int) -> None:
    size = bucket(n, multiple)
    assert size % multiple == 0
    assert size >= max(n, 1)
    assert size - multiple < max(n, 1)


def test_shapes_come_in_steps() -> None:
    """Every number of short documents gives one of few shapes: `mx.compile` keeps an entry for each."""
    shapes = set()
    for n in range(1, 25):
        packed = pack([document([Text((9,))], CONFIG)] * n, 6, row_multiple=4, text_multiple=16)
        shapes.add((packed.ids.shape, packed.text_index.shape))
    assert shapes == {((4, 6), (16,)), ((8, 6), (32,)), ((12, 6), (48,))}


def test_length_counts_positions() -> None:
    assert length([]) == 0
    assert length([Text((1, 2, 3)), Image(0, 4), Text(())]) == 7
