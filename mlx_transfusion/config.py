"""Model configuration: every field, every default, the paper's presets, and strict reading of config.json.

Field names follow Hugging Face's Llama `config.json` where it has the same thing.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mlx_transfusion.errors import UserError
from mlx_transfusion.layout import Layout
from mlx_transfusion.picture_sizes import Size, named

T = TypeVar("T")
_POSITIVE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "image_height", "image_width", "image_channels", "patch_size", "time_frequencies", "image_std",
             "rms_norm_eps", "rope_theta", "max_position", "unet_channels", "unet_blocks")  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The paper's model (arXiv 2408.11039, section 3): one decoder for text tokens and image patches."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = "transfusion"
    num_key_value_heads: int | None = None
    """Grouped-query attention; None means one per attention head."""
    hidden_act: str = "silu"
    """Gate of the feed-forward layer: "silu" (SwiGLU, the paper) or "relu" (ReGLU: no exponential, which the
    CPU backend computes some 30 times slower than a product)."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = False

    image_height: int = 32
    """Height of the latent (or pixel) image in elements."""
    image_width: int = 32
    image_sizes: tuple[tuple[int, int], ...] = ()
    """[height, width] of further pictures that the model learns; needs patch_positions "coordinates"."""
    image_channels: int = 3
    patch_size: int = 8
    patch_encoder: str = "linear"
    """"linear", or "unet": convolutions down to the patches and up again, with skips (arXiv 2408.11039, 3.3)."""
    unet_channels: int = 64
    """Channels of the U-Net at full size, doubled by each of its log2(patch_size) halvings; a multiple of 4."""
    unet_blocks: int = 2
    """Residual blocks of the U-Net at each size, on the way down and on the way up."""
    image_attention: str = "bidirectional"
    """What a patch sees of its own picture: "bidirectional" (all of it, the paper) or "causal" (the patches before
    it: the ablation of arXiv 2408.11039, table 5)."""
    patch_positions: str = "none"
    """"none" (the paper: raster order through RoPE alone), "learned" (one added vector per patch place) or
    "coordinates" (added, from each patch's distances to the four edges: for pictures of any size)."""
    patch_skip: bool = False
    """Add the noisy patch, times a gain that depends on the angle, to the decoder's output (off in the paper)."""
    painter: bool = False
    """Own weights for the tokens of a picture that is being painted, beside those that read and write: a student
    distilled this way leaves every other number of its teacher as it was."""
    guidance_condition: bool = False
    """The guidance scale is an input beside the angle: a student that was distilled with a range of scales."""
    time_frequencies: int = 32
    """Number of frequencies of the angle embedding; the highest is 1 radian per radian (arXiv 2410.11081, 4.1)."""
    prediction: str = "velocity"
    """What the network predicts: "epsilon" (the noise, as the paper) or "velocity" (TrigFlow)."""
    image_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Per-channel mean of the data, pixels scaled to [-1, 1]."""
    image_std: float = 1.0
    """One standard deviation for all channels: the model sees (pixels - mean) / std."""

    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    unk_token_id: int = 3
    boi_token_id: int = 4
    eoi_token_id: int = 5
    max_position: int = 4096
    """Longest sequence (text tokens and patches together) that generation accepts."""

    def __post_init__(self) -> None:
        one_of("hidden_act", self.hidden_act, ("silu", "relu"))
        one_of("prediction", self.prediction, ("epsilon", "velocity"))
        one_of("image_attention", self.image_attention, ("bidirectional", "causal"))
        one_of("patch_positions", self.patch_positions, ("none", "learned", "coordinates"))
        one_of("patch_encoder", self.patch_encoder, ("linear", "unet"))
        check_positive(self, "model config", _POSITIVE)
        check_heads(self)
        self._check_sizes()
        if self.patch_encoder == "unet":
            self._check_unet()
        check_special_ids(self, self.vocab_size)
        if len(self.image_mean) != self.image_channels:
            raise UserError(
                f"model config: image_mean has {len(self.image_mean)} values, expected one for each of the "
                f"{self.image_channels} channels"
            )

    def _check_sizes(self) -> None:
        for height, width in self.sizes:
            if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
                raise UserError(
                    f"model config: image {width}x{height} cannot be cut into patches of {self.patch_size}; "
                    "choose a patch_size that divides both"
                )
        if len(set(self.sizes)) < len(self.sizes):
            raise UserError(f"model config: image_sizes repeats a size: {named(self.sizes)}")
        if self.image_sizes and self.patch_positions != "coordinates":
            raise UserError(
                f'model config: patch_positions "{self.patch_positions}" cannot tell sizes apart: image_sizes needs '
                '"coordinates"'
            )

    def _check_unet(self) -> None:
        if self.patch_size & (self.patch_size - 1):
            raise UserError(
                f'model config: patch_encoder "unet" halves the picture down to its patches, so patch_size '
                f"{self.patch_size} must be a power of two"
            )
        if self.unet_channels % 4:
            raise UserError(
                f"model config: unet_channels is {self.unet_channels}, expected a multiple of 4 "
                "(groups of 4 channels are normalised together)"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) in elements of all pictures that the model learns, its own size first."""
        return (self.image_height, self.image_width), *self.image_sizes

    def grid(self, size: Size | None = None) -> Size:
        """(rows, columns) of the patches of a picture of (height, width); None: of the model's own size."""
        height, width = size or self.sizes[0]
        return height // self.patch_size, width // self.patch_size

    def at_size(self, height: int, width: int) -> ModelConfig:
        """This model where (height, width), in elements, is its own size; all those that it learnt stay listed.

        Raises UserError for a size that patches do not divide, or that positions do not reach.
        """
        if (height, width) == self.sizes[0]:
            return self
        others = tuple(size for size in self.sizes if size != (height, width))
        return dataclasses.replace(self, image_height=height, image_width=width, image_sizes=others)

    @property
    def patches_per_image(self) -> int:
        """Number of image tokens N of one picture of the model's own size."""
        return math.prod(self.grid())

    @property
    def patch_dim(self) -> int:
        """Number of image elements P in one patch."""
        return self.image_channels * self.patch_size**2

    @property
    def bidirectional(self) -> bool:
        """Whether every patch sees its whole picture."""
        return self.image_attention == "bidirectional"

    @property
    def layout(self) -> Layout:
        """BOS, text, BOI picture EOI, text, EOS."""
        return Layout(
            bos=self.bos_token_id,
            eos=(self.eos_token_id,),
            boi=self.boi_token_id,
            eoi=self.eoi_token_id,
            pad=self.pad_token_id,
            unk=self.unk_token_id,
            banned=(self.pad_token_id, self.bos_token_id, self.unk_token_id, self.eoi_token_id),
            picture_tokens=max(math.prod(self.grid(size)) for size in self.sizes) + 2,
            max_position=self.max_position,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for config.json."""
        return dataclasses.asdict(self) | {
            "image_mean": list(self.image_mean),
            "image_sizes": [list(size) for size in self.image_sizes],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a config.json dict strictly; raises UserError for unknown or missing keys and wrong types."""
        return from_dict(cls, data, where)


def check_positive(config: object, what: str, names: Iterable[str]) -> None:
    """Raises UserError, which begins with `what`, unless each named field of `config` is a number above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{what}: {name} is {getattr(config, name)}, expected a positive number")


class _Heads(Protocol):
    @property
    def hidden_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...


def check_heads(config: _Heads) -> None:
    """Raises UserError unless the heads divide the width, evenly for rotary pairs, and the key/value heads them."""
    if config.hidden_size % (2 * config.num_attention_heads):
        raise UserError(
            f"model config: hidden_size {config.hidden_size} must be an even multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.kv_heads <= 0 or config.num_attention_heads % config.kv_heads:
        raise UserError(
            f"model config: num_attention_heads {config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {config.kv_heads}"
        )


def check_special_ids(config: object, vocabulary: int) -> None:
    """Raises UserError unless the structural ids are tokens of a text vocabulary."""
    for name in ("pad", "bos", "eos", "unk", "boi", "eoi"):
        if not 0 <= getattr(config, f"{name}_token_id") < vocabulary:
            raise UserError(
                f"model config: {name}_token_id is {getattr(config, f'{name}_token_id')}, expected 0 to "
                f"vocab_size - 1 ({vocabulary - 1})"
            )


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises UserError unless the value is one of those allowed."""
    if value not in allowed:
        raise UserError(f'config: {name} is "{value}", expected one of {", ".join(allowed)}')


def _latent_preset(layers: int, dim: int, heads: int, ffn: int) -> dict[str, Any]:
    """One row of the paper's table 2: Llama tokenizer, 32x32x8 latents, 2x2 patches (256 an image)."""
    return {
        "vocab_size": 32000, "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": ffn, "image_height": 32, "image_width": 32, "image_channels": 8, "patch_size": 2,
        "image_mean": (0.0,) * 8, "prediction": "epsilon",
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "0.16b": _latent_preset(16, 768, 12, 2048),
    "0.37b": _latent_preset(24, 1024, 16, 2816),
    "0.76b": _latent_preset(24, 1536, 24, 4096),
    "1.4b": _latent_preset(24, 2048, 16, 5632),
    "7b": _latent_preset(32, 4096, 32, 11008),
}
"""The paper's table 2, keyed by its names; feed-forward widths follow Llama's rounding to 256."""

PAPER_UNET: dict[str, Any] = {"patch_encoder": "unet", "unet_channels": 640, "unet_blocks": 2}
"""What turns a preset into the paper's U-Net variant: 0.27 billion more parameters at 7B (models/unet.py)."""
_UNET = "-unet"


def preset(name: str) -> ModelConfig:
    """The paper's model of that size, "7b-unet" with its U-Net; raises UserError for an unknown name."""
    return ModelConfig(**preset_fields(name))


def preset_fields(name: str, where: str = "") -> dict[str, Any]:
    """The fields of `preset`; raises UserError, which begins with `where`, for an unknown name."""
    size = name.removesuffix(_UNET)
    if size not in PRESETS:
        raise UserError(
            f'{where}preset "{name}" is unknown, expected one of {", ".join(PRESETS)}, '
            f'with or without "{_UNET}" behind it'
        )
    return PRESETS[size] | (PAPER_UNET if name.endswith(_UNET) else {})


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build a dataclass from plain (JSON or TOML) data, strictly; nested dataclasses are read the same way.

    Raises UserError that names the key and `where` it stands: unknown (with the nearest right one), missing,
    or of the wrong type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a table of keys, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known keys: {', '.join(sorted(fields))}"
            raise UserError(f'{where}: unknown key "{key}"{hint}')
    hints = typing.get_type_hints(cls)
    values = {key: _convert(value, hints[key], f"{where}: {key}") for key, value in data.items()}
    for name, f in fields.items():
        if (
            name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise UserError(f'{where}: key "{name}" is missing')
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against a type hint (scalars, optionals, tuples, lists, nested dataclasses)."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(h for h in typing.get_args(hint) if h is not type(None)), where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {value!r}")
        inner, *others = typing.get_args(hint)
        if origin is tuple and Ellipsis not in others and len(value) != 1 + len(others):
            raise UserError(f"{where}: expected a list of {1 + len(others)}, found {value!r}")
        return origin(_convert(v, inner, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a table of keys, found {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


__all__ = ["PAPER_UNET", "PRESETS", "ModelConfig", "from_dict", "preset"]
