"""What generation asks of a model, whatever its family: to read, to write, and to paint.

Base classes, because a language model does no more than write, and pictures are denoised or written, too. Everything
behind the border of `velocity` is TrigFlow: x = cos(a) x0 + sin(a) z at the angle a in [0, pi/2], data and noise of
unit standard deviation. A family that was trained to predict noise, clean data or a rectified flow converts inside
(trigflow.py), and nothing else knows.

A module `models/NAME.py` ends with `FAMILY = Family(config class, model class)`; model_io.py lists the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_transfusion import sampling
from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.picture_sizes import Size, named


class FamilyConfig(Protocol):
    """The fields of config.json of one family: a frozen dataclass."""

    @property
    def model_type(self) -> str:
        """The family's name in config.json."""

    @property
    def vocab_size(self) -> int:
        """Rows of the text head."""

    @property
    def layout(self) -> Layout:
        """How text and pictures stand in a sequence."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> Any:
        """Read that data strictly. Raises UserError for unknown or missing keys and wrong types."""


class Family(NamedTuple):
    """One entry of the table of families."""

    config: type[FamilyConfig]
    model: Any
    """Subclass of TextFamily, built from such an instance."""


class TextFamily(nn.Module):
    """A model that reads and writes text behind a cache of keys and values."""

    @property
    def config(self) -> FamilyConfig:
        """The configuration the model was built from."""
        raise NotImplementedError

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` rows."""
        raise NotImplementedError

    def extend_text(self, ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        """Read text tokens [B, T] (right-padded to `lengths` [B]) into `cache`.

        Returns the logits [B, V] after each row's last token.
        """
        raise NotImplementedError

    def prefill(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[mx.array, KVCache]:
        """Read prompts once: as `extend_text`, into a new cache, which is returned beside the logits."""
        cache = self.new_cache(len(ids))
        return self.extend_text(ids, lengths, cache), cache


class PictureFamily(TextFamily):
    """A model that also paints: N tokens of P numbers a picture, denoised behind a frozen cache."""

    @property
    def uses_lanes(self) -> bool:
        """Whether `velocity` shares its rows out between the cores of a CPU (lanes.py)."""
        return False

    @property
    def predicts_noise(self) -> bool:
        """Whether it predicts eps, which says nothing about the picture at pi/2: sampling starts a little below."""
        return False

    @property
    def guidance_condition(self) -> bool:
        """Whether `velocity` is told the guidance scale and needs no second pass."""
        return False

    @property
    def picture_channels(self) -> int:
        """Channels of what `decode` gives."""
        return 3

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, P): tokens of a picture and numbers in each, as `velocity` takes them."""
        raise NotImplementedError

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the pictures that it paints, in pixels."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) in pixels of all pictures that it learnt, its own size first."""
        return (self.picture_size,)

    def at_size(self, height: int, width: int) -> PictureFamily:
        """The same model, on the same weights, that paints pictures of that size in pixels.

        Raises UserError for a size that it cannot paint.
        """
        if (height, width) == self.picture_size:
            return self
        raise UserError(
            f"{width}x{height}: this model paints {named([self.picture_size])} pictures only: leave out --width and "
            "--height"
        )

    def reading_size(self, height: int, width: int) -> Size:
        """(height, width) that a user's picture of that size is brought to before `read_picture`."""
        return self.input_size

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of a user's picture, of a family that reads only one size."""
        return self.picture_size

    @property
    def pads_input(self) -> bool:
        """Whether a user's picture keeps all it shows, in a grey square, instead of losing its longer ends."""
        return False

    def prompt_text(self, prompt: str) -> str:
        """The text whose tokens `image_prefix` takes: the prompt, or the turns of a chat around it."""
        return prompt

    def text_logits(self, ids: mx.array) -> mx.array:
        """Logits [B, T, V] after every token of whole texts [B, T]; padding on the right changes nothing before it.

        What training on text needs. Raises UserError where the family has none.
        """
        raise UserError(
            f"a {self.config.model_type} model is not trained on text: use rows with pictures alone"
        )

    def image_prefix(self, ids: Sequence[int]) -> list[int]:
        """All that is read before the picture of a prompt is painted: BOS, the prompt's tokens, BOI."""
        layout = self.config.layout
        return [i for i in (layout.bos, *ids, layout.boi) if i is not None]

    def guide(self, prefixes: Sequence[Sequence[int]], negative: Sequence[int] | None = None) -> KVCache:
        """What classifier-free guidance leads away from: one row for all prefixes, or one for each.

        negative: a whole prefix, of `image_prefix`; None means a prompt without any text.
        """
        ids = np.array([negative or self.image_prefix([])], np.int32)
        return self.prefill(ids, np.array([ids.shape[1]]))[1]

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """TrigFlow velocity [B, N, P] of noisy patches [B, N, P] at angles [B] (radians), seen after the cache.

        The cache stays as it is. guidance: the scales [B] of a model with `guidance_condition`.
        """
        raise NotImplementedError

    def guided(
        self,
        conditional: mx.array,
        unconditional: mx.array,
        scale: float,
        x: mx.array | None = None,
        angle: float | None = None,
    ) -> mx.array:
        """Classifier-free guidance at a scale of velocities [B, N, P] with and without the prompt.

        x, angle: the states [B, N, P] that they are at, for a family that needs to know.
        """
        return sampling.guided(conditional, unconditional, scale)

    @property
    def edit_size(self) -> tuple[int, int] | None:
        """(height, width) that a picture is brought to before it is edited; None: as any other that is read."""
        return None

    def read_edit(self, pixels: mx.array | None, ids: Sequence[int]) -> KVCache:
        """Keys and values of an edit up to the new picture: BOS, the source [1, H, W, 3] in [0, 1], ids, BOI.

        Without a source BOS, ids and BOI.
        """
        layout, cache = self.config.layout, self.new_cache(1)

        def read(given: Sequence[int | None]) -> None:
            real = [i for i in given if i is not None]
            if real:
                self.extend_text(np.array([real], np.int32), np.array([len(real)]), cache)

        if pixels is None:
            read([layout.bos, *ids, layout.boi])
            return cache
        read([layout.bos])
        self.read_picture(pixels, cache)
        read([*ids, layout.boi])
        return cache

    def unpictured(self, ids: Sequence[int]) -> Sequence[int]:
        """What of an instruction is read where guidance by the source leads away from a document without it."""
        return []

    def guided_edit(
        self,
        full: mx.array,
        source: mx.array,
        nothing: mx.array | None,
        scales: tuple[float, float],
        x: mx.array,
        angle: float,
    ) -> mx.array:
        """Both guidances of an edit (arXiv 2211.09800, equation 3), of velocities [B, N, P].

        full, source, nothing: seen after all, after the source alone, and after what `unpictured` leaves (None where
        the second scale is 1). scales: of the instruction, and of the source. x, angle: the states they are at.
        """
        out = sampling.guided(full, source, scales[0])
        return out if nothing is None else out + (scales[1] - 1) * (source - nothing)

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read the finished picture [B, N, P] that was painted after BOI, so that what follows sees it.

        Raises UserError where the family cannot read what it paints.
        """
        raise UserError(
            f"a {self.config.model_type} model cannot read a picture that it has painted: use generate for pictures"
        )

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read a user's picture [B, H, W, 3] in [0, 1] with the tokens around it; returns logits [B, V] after it.

        H, W are of `reading_size`. Raises UserError where the family cannot read pictures.
        """
        raise UserError(f"a {self.config.model_type} model cannot read pictures: it only paints them")

    def describe_prompt(self) -> tuple[list[int], list[int]]:
        """Token ids before (without BOS) and behind a picture that ask for its description."""
        return [], []

    def question_prompt(self, question: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids before (without BOS) and behind a picture that ask a user's question, given in tokens."""
        return [], list(question)

    def encode(self, pixels: mx.array) -> mx.array:
        """Pixels [B, H, W, 3] in [0, 1] -> patches [B, N, P] with unit standard deviation."""
        raise NotImplementedError

    def decode(self, patches: mx.array) -> mx.array:
        """Patches [B, N, P] -> pixels [B, H, W, C] in [0, 1]."""
        raise NotImplementedError

    def preview(self, patches: mx.array) -> mx.array:
        """As `decode`, for a look while sampling: coarser where that is much cheaper."""
        return self.decode(patches)


class CodeFamily(PictureFamily):
    """A model that writes a picture as N codes, ids of its vocabulary like any other, one after the other.

    What other families call patches [B, N, P] are codes int32 [B, N] here, counted from 0.
    """

    @property
    def first_code(self) -> int:
        """Id of code 0; the codes are the last ids of the vocabulary."""
        raise NotImplementedError

    def code_ids(self, codes: mx.array | np.ndarray) -> np.ndarray:
        """Codes [B, N] as ids of the vocabulary, int32 [B, N]."""
        return np.array(codes, np.int32) + self.first_code

    def extend_image(self, x0: mx.array, cache: KVCache) -> None:
        """Read the codes [B, N] of a finished picture behind BOI into `cache`."""
        ids = self.code_ids(x0)
        self.extend_text(ids, np.full(len(ids), ids.shape[1]), cache)

    def read_picture(self, pixels: mx.array, cache: KVCache) -> mx.array:
        """Read BOI, a picture [B, H, W, 3] in [0, 1] as codes, and EOI; returns the logits [B, V] after it."""
        layout = self.config.layout
        ids = np.pad(self.code_ids(self.encode(pixels)), ((0, 0), (1, 1)))
        ids[:, 0], ids[:, -1] = layout.boi, layout.eoi
        return self.extend_text(ids, np.full(len(ids), ids.shape[1]), cache)

    def velocity(
        self, x: mx.array, angle: mx.array, cache: KVCache, guidance: mx.array | None = None
    ) -> mx.array:
        """Raises UserError: nothing is denoised."""
        raise UserError(
            f"a {self.config.model_type} model writes its pictures as tokens and has no noise to remove: this needs "
            "a diffusion model"
        )
