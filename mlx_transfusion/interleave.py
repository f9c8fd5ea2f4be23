"""Text and pictures in one stream: the model writes until it opens an image, paints it, and writes on.

Transfusion, arXiv 2408.11039, section 3.1: tokens are sampled as in any language model; on BOI a picture is
painted with everything so far as its condition; then the clean picture joins the context, EOI follows because
the layout says so, and text goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.events import Finished, GeneratedImage, Painted, Step, Token
from mlx_transfusion.greedy import ban, check_choice, is_greedy, likeliest
from mlx_transfusion.images import ImageLike, load_for
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.painting import paint_after
from mlx_transfusion.records import completion_record
from mlx_transfusion.settings import DEFAULTS, GenerationSettings, ResolvedSettings
from mlx_transfusion.text_stream import TextStream
from mlx_transfusion.text_to_image import check_pictures, negative_prefix, step_reporter, to_uint8
from mlx_transfusion.token_sampling import sample_token

TOKEN_STREAM = "generate/token"
"""Uniform number of token k of a document at its seed: index k (noise.py)."""

OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Tokens:
    """A segment of a prompt that is token ids already, special ones among them: a chat template's, for one."""

    ids: tuple[int, ...]


Segment = str | ImageLike | Tokens


def complete(
    loaded: Loaded,
    prompt: str | Sequence[Segment],
    seed: int = 0,
    settings: GenerationSettings = DEFAULTS,
    on_step: OnStep | None = None,
) -> Iterator[Token | Painted | Finished]:
    """Continue a document that may hold pictures: yields text and pictures as they come, then `Finished`.

    prompt: a text, or segments: texts are str, token ids Tokens, images anything else of ImageLike (a file as a
    Path). BOS comes first, unless the first segment is Tokens that begin with it. A language model only writes,
    whatever max_images says. on_step is called while a picture is painted, where a generator cannot yield.
    Raises UserError, before anything is written, for bad settings, for those that this model cannot paint with
    (where it may paint), and for a prompt that is empty or leaves no room.
    """
    if not isinstance(loaded.model, PictureFamily):
        settings = replace(settings, max_images=0)
    if settings.max_images:
        resolved = settings.for_model(loaded.extra, loaded.name)
        check_pictures(loaded)
    else:
        resolved = settings.resolve()
    segments: list[Segment] = [prompt] if isinstance(prompt, str) else list(prompt)
    document = _Document(loaded, segments, seed, resolved, on_step)
    return document.run()


def describe(
    loaded: Loaded,
    image: ImageLike,
    seed: int = 0,
    settings: GenerationSettings = DEFAULTS,
    question: str | None = None,
) -> str:
    """What the model says about an image: text after it until EOS, by default always the likeliest token.

    question: what a model that was taught to answer is asked; None asks it for a description. Raises UserError when
    the image cannot be read, for a model that does not read images, and for an empty question.
    """
    pixels = load_for(loaded.pictures, image)
    if question is None:
        around = loaded.pictures.describe_prompt()
    elif ids := loaded.tokenizer.encode(question.strip()):
        around = loaded.pictures.question_prompt(ids)
    else:
        raise UserError("the question is empty: ask something about the picture")
    before, behind = (Tokens(tuple(ids)) for ids in around)
    events = complete(loaded, [before, pixels, behind], seed, replace(settings, max_images=0))
    return "".join(event.text for event in events if isinstance(event, Token)).strip()


class _Document:
    """One growing document: its keys and values, and the text run at its end."""

    def __init__(
        self,
        loaded: Loaded,
        segments: list[Segment],
        seed: int,
        settings: ResolvedSettings,
        on_step: OnStep | None,
    ) -> None:
        self.loaded, self.model, self.layout = loaded, loaded.model, loaded.config.layout
        self.seed, self.settings, self.on_step = seed, settings, on_step
        self.prompt = " ".join(s for s in segments if isinstance(s, str))
        noise.uniform(seed, 0)  # a bad seed shall not come up after an hour of painting
        self.negative = negative_prefix(loaded, settings) if settings.max_images else None
        self.pictures = 0
        self.ahead = False  # whether the cache has read the token that is chosen now
        self.masks: dict[
            int, mx.array
        ] = {}  # by the number of banned tokens, which only the one of pictures changes
        self.read: list[int] = []  # all token ids so far, those around pictures too
        self.written: list[int] = []  # text tokens so far, the prompt's too
        self.run_ids: list[int] = []  # those since the last picture
        self._read(segments)

    def run(self) -> Iterator[Token | Painted | Finished]:
        """Write and paint until the document ends, a stop text comes, or there is no more room."""
        text = TextStream(self.loaded.tokenizer, self.run_ids, self.settings.stop)
        reason: str = "length"
        count = 0
        while count < self.settings.max_tokens and self._room() > 0:
            token = self._next_token(count)
            count += 1
            if token in self.layout.eos:
                reason = "stop"
                break
            if token == self.layout.boi:
                yield from _token(text.flush())
                yield Painted(self._paint())
                text = TextStream(self.loaded.tokenizer, (), self.settings.stop)
                continue
            yield from _token(text.push(token))
            if text.stopped:
                reason = "stop"
                break
            self.written.append(token)
            self._extend([token])
        yield from _token(text.flush())
        yield Finished("stop" if reason == "stop" else "length")

    def _read(self, segments: list[Segment]) -> None:
        """Read the prompt: BOS, then texts and images in their order."""
        parts = [self._part(segment) for segment in segments]
        if not any(isinstance(part, np.ndarray) or part for part in parts):
            raise UserError("the prompt is empty: give some text to continue")
        self._check_length(parts)
        self.cache = self.model.new_cache(1)
        bos = self.layout.bos
        has_bos = isinstance(parts[0], list) and parts[0][:1] == [bos]
        begins_with_text = isinstance(next(p for p in parts if not isinstance(p, list) or p), list)
        wanted = begins_with_text or self.layout.bos_before_pictures
        pending = [bos] if bos is not None and wanted and not has_bos else []
        for part in parts:
            if isinstance(part, list):
                pending += part
                self.written += part
                self.run_ids += part
            else:
                if pending:
                    self._extend(pending)
                pixels = mx.array(part[None].astype(np.float32) / 255)
                self.logits = self.loaded.pictures.read_picture(pixels, self.cache)
                pending, self.run_ids = [], []
        if pending:
            self._extend(pending)

    def _part(self, segment: Segment) -> list[int] | np.ndarray:
        """Token ids of a text, pixels uint8 [H, W, 3] of an image."""
        if isinstance(segment, Tokens):
            return list(segment.ids)
        if isinstance(segment, str):
            return self.loaded.tokenizer.encode(segment)
        return load_for(self.loaded.pictures, segment)

    def _check_length(self, parts: list[list[int] | np.ndarray]) -> None:
        longest = self.layout.max_position - 1
        length = 1 + sum(len(p) if isinstance(p, list) else self.layout.picture_tokens for p in parts)
        if length > longest:
            raise UserError(
                f"the prompt is too long: {length} tokens with its pictures; model {self.loaded.name} takes "
                f"at most {longest}"
            )

    def _extend(self, ids: list[int]) -> None:
        """Read text tokens; the logits of what follows them are kept."""
        self.read += ids
        if self.ahead:
            self.ahead = False
            return
        self.logits = self.model.extend_text(np.array([ids], np.int32), np.array([len(ids)]), self.cache)

    def _guide(self, model: PictureFamily) -> KVCache | None:
        """What guidance leads the picture in hand away from."""
        if self.settings.guidance == 1 or model.guidance_condition:
            return None
        return model.guide([self.read], self.negative)

    def _mark(self, token: int | None) -> None:
        """Read a token around a picture, of a family that has one."""
        if token is not None:
            self._extend([token])

    def _room(self) -> int:
        """Tokens that still fit the longest sequence of the model."""
        return self.layout.max_position - int(self.cache.lengths[0])

    def _banned(self) -> list[int]:
        """Tokens that cannot come now."""
        layout = self.layout
        # Rows of the head that only round its size up are no tokens.
        banned = [*layout.banned, *range(self.loaded.tokenizer.vocab_size, self.loaded.config.vocab_size)]
        full = self.pictures >= self.settings.max_images or self._room() < layout.picture_tokens
        if layout.boi is not None and full:
            banned.append(layout.boi)
        return banned

    def _next_token(self, index: int) -> int:
        s, banned = self.settings, self._banned()
        if is_greedy(s):
            return self._likeliest(index, banned)
        return sample_token(
            self.logits[0].astype(mx.float32),  # numpy has no bfloat16
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            repetition_penalty=s.repetition_penalty,
            previous=self.written,
            banned=banned,
            u=float(noise.uniform(self.seed, index, stream=TOKEN_STREAM)),
        )

    def _likeliest(self, index: int, banned: list[int]) -> int:
        """The likeliest token; unless it is the last one, the cache is reading it before we know it."""
        mask = self.masks.get(len(banned))
        if mask is None:
            mask = self.masks[len(banned)] = ban(banned, self.loaded.config.vocab_size)
        token, score = likeliest(self.logits, mask)
        if index + 1 < self.settings.max_tokens and self._room() > 1:
            self.logits = self.model.extend_text(token[:, None], np.ones(1, int), self.cache)  # type: ignore[arg-type]
            self.ahead = True
            mx.async_eval(token, score, self.logits)
        check_choice(score)
        return int(token.item())  # type: ignore[arg-type]

    def _paint(self) -> GeneratedImage:
        """Paint the picture that BOI opens, and read it."""
        start = time.perf_counter()
        index = self.pictures
        model = self.loaded.pictures
        self._mark(self.layout.boi)
        patches = paint_after(
            model,
            self.cache,
            [self.seed],
            self.settings,
            guide=self._guide(model),
            picture=index,
            callback=step_reporter(self.loaded, [index], self.on_step),
        )
        model.extend_image(patches, self.cache)
        self._mark(self.layout.eoi)
        self.pictures += 1
        pixels = to_uint8(model.decode(patches))[0]
        record = completion_record(self.loaded, self.prompt, self.seed, self.settings, index)
        return GeneratedImage(pixels, self.prompt, self.seed, index, record, time.perf_counter() - start)


def _token(piece: tuple[str, tuple[int, ...]]) -> Iterator[Token]:
    if piece[0]:
        yield Token(*piece)
