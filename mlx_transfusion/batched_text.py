"""Several texts written at once: the weights are read once for all rows of a step, which is what a step costs.

A row depends on its own prompt and seed, not on its neighbours; `interleave.complete` writes the same, one at a time
and with pictures.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_transfusion import noise
from mlx_transfusion.errors import UserError
from mlx_transfusion.greedy import ban, check_choice, is_greedy, likeliest
from mlx_transfusion.interleave import TOKEN_STREAM, Tokens
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.settings import DEFAULTS, GenerationSettings
from mlx_transfusion.text_stream import TextStream
from mlx_transfusion.token_sampling import sample_token


@dataclass(frozen=True)
class Written:
    """What was written after one prompt."""

    text: str
    tokens: int
    """Tokens that were drawn, the one that ended the text too."""
    reason: str
    """"stop" (an end token or a stop text) or "length"."""


@dataclass
class _Row:
    """One text that still grows."""

    index: int
    ids: list[int]
    """The prompt and all that was written."""
    stream: TextStream
    text: list[str] = field(default_factory=list)
    count: int = 0


def write_batch(
    loaded: Loaded, prompts: Sequence[str | Tokens], seed: int = 0, settings: GenerationSettings = DEFAULTS
) -> list[Written]:
    """Continue each prompt with text alone; prompt i draws its words with seed + i.

    BOS comes first, unless a prompt is Tokens that begin with it. Raises UserError for bad settings, and for a
    prompt that is empty or leaves no room.
    """
    settings = settings.resolve()
    for i in range(len(prompts)):
        noise.uniform(seed + i, 0)  # a bad seed shall not come up later
    rows = [_row(loaded, i, prompt, settings) for i, prompt in enumerate(prompts)]
    done: dict[int, Written] = {}
    if rows:
        _Batch(loaded, rows, seed, settings, done).run()
    return [done[i] for i in range(len(prompts))]


class _Batch:
    """The rows that are not finished, and their cache."""

    def __init__(self, loaded: Loaded, rows: list[_Row], seed: int, settings: GenerationSettings,
                 done: dict[int, Written]) -> None:  # fmt: skip
        self.loaded, self.rows, self.seed, self.settings, self.done = loaded, rows, seed, settings, done
        layout, size = loaded.config.layout, loaded.config.vocab_size
        never = {*layout.banned, *range(loaded.tokenizer.vocab_size, size), layout.boi}
        self.banned = sorted(i for i in never if i is not None)
        self.mask = ban(self.banned, size)

    def run(self) -> None:
        """Write until every row is finished."""
        lengths = np.array([len(row.ids) for row in self.rows])
        ids = np.zeros((len(self.rows), lengths.max()), np.int32)
        for row, content in zip(ids, self.rows, strict=True):
            row[: len(content.ids)] = content.ids
        logits, cache = self.loaded.model.prefill(ids, lengths)
        if is_greedy(self.settings):
            self._run_greedy(logits, cache)
            return
        while going := self._push_all(self._draw(logits)):
            cache = self._keep(going, cache)
            last = np.array([[row.ids[-1]] for row in self.rows], np.int32)
            logits = self.loaded.model.extend_text(last, np.ones(len(self.rows), int), cache)

    def _run_greedy(self, logits: mx.array, cache: KVCache) -> None:
        """The likeliest tokens stay on the device, so the next step is under way before they are looked at."""
        tokens, scores = likeliest(logits, self.mask)
        while True:
            if all(row.count + 1 == self.settings.max_tokens for row in self.rows):
                check_choice(scores)
                self._push_all(tokens.tolist())  # type: ignore[arg-type]
                return
            logits = self.loaded.model.extend_text(tokens[:, None], np.ones(len(self.rows), int), cache)  # type: ignore[arg-type]
            following, following_scores = likeliest(logits, self.mask)
            mx.async_eval(following, following_scores)
            check_choice(scores)
            going = self._push_all(tokens.tolist())  # type: ignore[arg-type]
            if not going:
                return
            if len(going) < len(self.rows):
                following = following[mx.array(going)]
            cache = self._keep(going, cache)
            tokens, scores = following, following_scores

    def _push_all(self, tokens: list[int]) -> list[int]:
        """Add a token to each row; which rows go on."""
        return [i for i, token in enumerate(tokens) if self._push(self.rows[i], token)]

    def _keep(self, going: list[int], cache: KVCache) -> KVCache:
        if len(going) == len(self.rows):
            return cache
        self.rows = [self.rows[i] for i in going]
        return cache.select(going)

    def _draw(self, logits: mx.array) -> list[int]:
        """The next token of every row, from logits [B, V]."""
        s = self.settings
        return [
            sample_token(
                line,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                repetition_penalty=s.repetition_penalty,
                previous=row.ids,
                banned=self.banned,
                u=float(noise.uniform(self.seed + row.index, row.count, stream=TOKEN_STREAM)),
            )
            for row, line in zip(self.rows, np.array(logits.astype(mx.float32)), strict=True)
        ]

    def _push(self, row: _Row, token: int) -> bool:
        """Add a token to a row; False when that ends it."""
        row.count += 1
        if token in self.loaded.config.layout.eos:
            return self._finish(row, "stop")
        row.text.append(row.stream.push(token)[0])
        if row.stream.stopped:
            return self._finish(row, "stop")
        row.ids.append(token)
        full = row.count == self.settings.max_tokens or len(row.ids) >= self.loaded.config.layout.max_position
        return self._finish(row, "length") if full else True

    def _finish(self, row: _Row, reason: str) -> bool:
        row.text.append(row.stream.flush()[0])
        self.done[row.index] = Written("".join(row.text), row.count, reason)
        return False


def _row(loaded: Loaded, index: int, prompt: str | Tokens, settings: GenerationSettings) -> _Row:
    ids = list(prompt.ids) if isinstance(prompt, Tokens) else loaded.tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"prompt {index + 1} is empty: give some text to continue")
    stream = TextStream(loaded.tokenizer, ids, settings.stop)
    layout = loaded.config.layout
    if layout.bos is not None and ids[0] != layout.bos:
        ids = [layout.bos, *ids]
    if len(ids) > layout.max_position - 1:
        raise UserError(
            f"prompt {index + 1} is too long: {len(ids)} tokens; model {loaded.name} takes at most "
            f"{layout.max_position - 1}"
        )
    return _Row(index, ids, stream)
