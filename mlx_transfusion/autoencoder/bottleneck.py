"""Between encoder and decoder in training: a sample of the normal distribution (KL), or the nearest codes (VQ)."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_transfusion import noise
from mlx_transfusion.autoencoder.config import AutoencoderTraining, CodebookConfig
from mlx_transfusion.models.autoencoder import AutoencoderKL
from mlx_transfusion.models.autoencoder_vq import AutoencoderVQ
from mlx_transfusion.models.quantizer import Usage, even_usage, nearest, revive, update_usage

Tree = Any
ROUNDS = 10
"""Of k-means, before a codebook's first step."""


class Passage(NamedTuple):
    """Pictures on their way to the decoder."""

    z: mx.array
    """[B, h, w, C], for `decode`."""
    loss: mx.array
    """The bottleneck's part of the loss, weighted."""
    terms: dict[str, mx.array]
    """What is reported, not weighted."""
    elements: mx.array
    """[N, C], as the encoder gives them, without a gradient; empty for KL, which has no use for them."""
    codes: mx.array
    """[N], their codes; empty for KL."""


def draws(config: AutoencoderTraining, step: int, pictures: int) -> np.ndarray:
    """The random numbers of a step: noise [B, h, w, C] (KL), or the element that each code would go to [K] (VQ)."""
    side, m = config.data.size // config.model.factor, config.model
    if m.quantizer is None:
        shape = (pictures, side, side, m.latent_channels)
        return noise.normal(config.seed, step, shape, "autoencoder/latent")
    return noise.integers(config.seed, step, pictures * side**2, (m.quantizer.codes,), "autoencoder/revive")


def normal_passage(model: AutoencoderKL, pixels: mx.array, eps: mx.array, weight: float) -> Passage:
    """A sample. The divergence is in nats over the number of pixel values."""
    moments = model.encode(pixels)
    divergence = moments.kl().sum() / pixels.size
    none = mx.zeros((0,))
    return Passage(moments.sample(eps), weight * divergence, {"kl": divergence}, none, none)


def code_passage(model: AutoencoderVQ, pixels: mx.array, config: CodebookConfig) -> Passage:
    """The nearest codes (1711.00937, equation 3). With running means the codebook has no loss."""
    z, q = model.quantize(pixels)
    codebook_weight = 0.0 if config.ema else config.loss
    return Passage(
        q.values,
        codebook_weight * q.codebook_loss + config.commitment * q.commitment,
        {"codebook": q.codebook_loss, "commitment": q.commitment},
        mx.stop_gradient(z).reshape(-1, z.shape[-1]),
        q.codes.reshape(-1),
    )


def start_usage(model: AutoencoderVQ, elements: int) -> Tree:
    """The running sums of a new run, as a tree for its weights. elements: of a batch."""
    return even_usage(model.quantizer.codebook, elements)._asdict()


def follow(
    weights: Tree, ema: Tree, usage: Tree, passage: Passage, chosen: mx.array, config: CodebookConfig
) -> tuple[Tree, Tree, Tree, dict[str, mx.array]]:
    """Behind the optimiser's step: running sums, running means, revival.

    Gives weights, averaged weights, usage and what is reported. A revived code has no history, so the averaged
    weights get it as it is.
    """
    now = update_usage(Usage(**usage), passage.elements, passage.codes, config.decay)
    codebook = now.means if config.ema else weights["quantizer"]["codebook"]
    codebook, now, dead = revive(codebook, now, passage.elements, chosen, config.revive_below)
    averaged = mx.where(dead[:, None], codebook, ema["quantizer"]["codebook"])
    terms = {"perplexity": now.perplexity, "revived": dead.sum().astype(mx.float32)}
    return _with_codebook(weights, codebook), _with_codebook(ema, averaged), now._asdict(), terms


def _with_codebook(tree: Tree, codebook: mx.array) -> Tree:
    return tree | {"quantizer": {"codebook": codebook}}


def codebook_from(elements: np.ndarray, size: int, seed: int) -> mx.array:
    """A codebook [K, C] for elements [N, C]: some of them, drawn at random, moved to the means of what is nearest.

    That is k-means with few rounds. Of fewer than K elements some come twice.
    """
    order = noise.permutation(seed, 0, len(elements), "autoencoder/codebook")
    codebook, every = elements[np.resize(order, size)].astype(np.float32), mx.array(elements)
    for _ in range(ROUNDS):
        codes = np.array(nearest(every, mx.array(codebook)))
        counts = np.bincount(codes, minlength=size)
        sums = np.zeros_like(codebook)
        np.add.at(sums, codes, elements)
        codebook = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], codebook)
    return mx.array(codebook)


def quantized_start(ours: AutoencoderVQ, theirs: AutoencoderKL) -> None:
    """Give `ours` the weights of a KL autoencoder: its elements are then exactly the other's means.

    The 1x1 convolution behind the encoder mixes means and log-variances, so its rows for the means go into the
    convolution before it, and what stands behind is the identity.
    """
    tree = tree_map(lambda w: w, theirs.parameters())
    channels, out = ours.config.latent_channels, tree["encoder"]["conv_out"]
    weight, bias = out["weight"], out["bias"]
    if "quant_conv" in tree:
        mix = tree["quant_conv"]["weight"][:channels, 0, 0]
        weight = mx.einsum("oi,ihwc->ohwc", mix, weight)
        bias = mix @ bias + tree["quant_conv"]["bias"][:channels]
        identity = mx.eye(channels)[:, None, None]
        tree["quant_conv"] = {"weight": identity, "bias": mx.zeros((channels,))}
    tree["encoder"]["conv_out"] = {"weight": weight[:channels], "bias": bias[:channels]}
    ours.update(tree)
