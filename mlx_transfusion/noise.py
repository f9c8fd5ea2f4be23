"""Random numbers addressed by name: a draw depends on its own (seed, stream, index), on nothing drawn before.

So picture i of a batch does not depend on the batch, a resumed training run sees the noise it would have
seen, and any machine or language can repeat it. The definition, complete:

    bits     64-bit words of Philox4x64-10 (Salmon et al. 2011); numpy keeps these raw words stable
    key      word 0: the seed;
             word 1: the first 8 bytes, little-endian, of SHA-256 of the UTF-8 text "<kind>:<stream>",
             where kind is the name of the function: normal, uniform, integers, permutation or place
    counter  word 0: 1, 2, 3, ... for successive blocks of 4 words;
             words 1 to 3: the index (missing words are 0)
    uniform  u = (word >> 11) / 2^53, float64, in [0, 1)
    normal   Box-Muller on pairs of uniforms (u, w): sqrt(-2 log(1 - u)) times cos(2 pi w), then sin(2 pi w);
             computed in float64 and rounded to float32
    integers floor(u * high): the bias of at most high / 2^53 is far below what anyone could measure
    permutation  the stable order that sorts n words
    place    a Feistel network of six rounds on halves of h = ceil(bits of (n - 1) / 2) bits, at least 1, applied
             again until the number is below n; a round is (left, right) -> (right, left ^ mix(right + word) mod 2^h),
             with one word of the stream a round and mix the finaliser of SplitMix64 (Steele et al. 2014)

Values fill an array in C order, so a larger array begins with the values of a smaller one. Different kinds,
streams, seeds and indices never share bits: give every use a stream of its own, e.g. "train/angle",
"train/noise".
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

from mlx_transfusion.errors import UserError

Index = int | tuple[int, ...]
"""Which draw of a stream: one number or up to three, e.g. (image, step)."""
Shape = int | tuple[int, ...]

_WORD = 1 << 64
_ROUNDS = 6
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@lru_cache(maxsize=1024)
def _stream_key(kind: str, stream: str) -> int:
    """Key word 1: the 64-bit hash of the kind of draw and the stream's name."""
    return int.from_bytes(hashlib.sha256(f"{kind}:{stream}".encode()).digest()[:8], "little")


def _words(kind: str, stream: str, seed: int, index: Index, count: int) -> np.ndarray:
    """The first `count` words (uint64) at this address. Raises UserError for a bad seed or index."""
    position = index if isinstance(index, tuple) else (index,)
    if not 0 <= seed < _WORD:
        raise UserError(f"seed {seed} is out of range: use a whole number from 0 to 2^64 - 1")
    if not 1 <= len(position) <= 3 or not all(0 <= word < _WORD for word in position):
        raise UserError(
            f"noise index {index} is out of range: use one to three whole numbers from 0 to 2^64 - 1"
        )
    counter = np.array([0, *position, *(0,) * (3 - len(position))], np.uint64)
    key = np.array([seed, _stream_key(kind, stream)], np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


def _size(shape: Shape) -> int:
    return shape if isinstance(shape, int) else math.prod(shape)


def _unit(words: np.ndarray) -> np.ndarray:
    """Words -> float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def uniform(seed: int, index: Index, shape: Shape = (), stream: str = "default") -> np.ndarray:
    """Uniform numbers in [0, 1), float64 of `shape` (0-d by default: `float(uniform(seed, i))` is one draw).

    Raises UserError for a seed or index outside 0..2^64-1.
    """
    return _unit(_words("uniform", stream, seed, index, _size(shape))).reshape(shape)


def normal(seed: int, index: Index, shape: Shape = (), stream: str = "default") -> np.ndarray:
    """Unit normal numbers, float32 of `shape`. Raises UserError for a seed or index outside 0..2^64-1."""
    count = _size(shape)
    pairs = _unit(_words("normal", stream, seed, index, count + count % 2)).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log1p(-pairs[:, 0]))
    turn = (2 * math.pi) * pairs[:, 1]
    values = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
    return values.reshape(-1)[:count].astype(np.float32).reshape(shape)


def integers(seed: int, index: Index, high: int, shape: Shape = (), stream: str = "default") -> np.ndarray:
    """Whole numbers in [0, high), int64 of `shape`.

    Raises UserError for a bad seed or index, or `high` outside 1..2^53.
    """
    if not 1 <= high <= 1 << 53:
        raise UserError(f"cannot draw a whole number below {high}: the bound must lie in 1..2^53")
    words = _words("integers", stream, seed, index, _size(shape))
    return np.floor(_unit(words) * high).astype(np.int64).reshape(shape)


def permutation(seed: int, epoch: Index, n: int, stream: str = "default") -> np.ndarray:
    """A random order of 0..n-1, int64 `[n]`, for this epoch. Raises UserError for a bad seed or epoch."""
    return np.argsort(_words("permutation", stream, seed, epoch, n), kind="stable")


def place(seed: int, epoch: Index, n: int, index: np.ndarray, stream: str = "default") -> np.ndarray:
    """Where `index`, int64 [K] in 0..n-1, comes in a random order of n things, int64 [K]: a permutation in no memory.

    Raises UserError for a bad seed or epoch, and for n outside 1..2^62.
    """
    if not 1 <= n <= 1 << 62:
        raise UserError(f"cannot put {n} things into an order: expected 1 to 2^62")
    half = max(1, -(-(n - 1).bit_length() // 2))
    keys = _words("place", stream, seed, epoch, _ROUNDS)
    mask = np.uint64((1 << half) - 1)
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():  # the network permutes 4^half >= n numbers: go on until one of the n comes up
        out[outside] = _feistel(out[outside], keys, half, mask)
        outside = out >= n
    return out.astype(np.int64)


def _feistel(x: np.ndarray, keys: np.ndarray, half: int, mask: np.uint64) -> np.ndarray:
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
        word = right + key
        for shift, factor in _MIX:
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
        left, right = right, left ^ ((word ^ (word >> np.uint64(31))) & mask)
    return (left << np.uint64(half)) | right
