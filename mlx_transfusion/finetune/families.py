"""What is trained of a converted model: which layers get adapters, which only a picture passes, what always stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import family
from mlx_transfusion.models.family import PictureFamily
from mlx_transfusion.training.config import AdapterTraining


@dataclass(frozen=True)
class Parts:
    """Patterns of linear layers' names (with * and ?), and names of top-level modules, of one family."""

    usual: tuple[str, ...]
    """Layers that get an adapter unless a run names others."""
    painting: tuple[str, ...]
    """Layers that nothing but a picture that is being painted passes: with adapters here alone, all text and all that
    is said about a user's picture stay bit for bit."""
    frozen: tuple[str, ...] = ()
    """Modules that a run of all weights leaves alone: autoencoders, encoders of users' pictures, tables."""
    tables: tuple[str, ...] = ()
    """Those of them that every pass reads."""
    head: str = "lm_head"
    """The module that turns hidden states into words."""

    def idle(self, adapter: bool, text: bool) -> tuple[str, ...]:
        """Modules that no step passes once all pictures are encoded.

        adapter: whether an adapter is trained, or all weights; text: whether there are rows of text alone.
        """
        encoders = tuple(name for name in self.frozen if name not in self.tables)
        return (*encoders, self.head) if adapter and not text else encoders

    def paints_only(self, names: list[str]) -> bool:
        """Whether all of these layers serve painting alone."""
        return all(any(fnmatchcase(name, pattern) for pattern in self.painting) for name in names)


_BAGEL = ("decoder.layers.*.generate.*_proj", "vae2llm", "llm2vae")
_JANUSFLOW = ("vision_gen_*.channelwise_linear_?", "vision_gen_*.cond_embeds_mapper", "vision_gen_*_aligner")
_SHOW_O2 = ("flow_head.layers.*_proj", "flow_head.*steering.linear", "flow_head.fc?", "flow_head.linear")

PARTS = {
    "bagel": Parts(
        _BAGEL,
        _BAGEL,
        ("autoencoder", "vision", "vision_positions", "connector", "latent_positions"),
        tables=("latent_positions",),
    ),
    "janusflow": Parts(
        ("language_model.model.layers.*_proj", *_JANUSFLOW),
        _JANUSFLOW,
        ("autoencoder", "vision_und_enc_model", "vision_und_enc_aligner", "beg_of_und_embed"),
        head="language_model.lm_head",
    ),
    "monoformer": Parts(
        ("layers.*_proj", "x_embedder", "final_layer.*"),
        ("x_embedder", "final_layer.*"),
        ("autoencoder", "vision", "im_embedder"),
    ),
    "show_o2": Parts(("model.layers.*_proj", *_SHOW_O2), _SHOW_O2, ("autoencoder",)),
    "transfusion_pytorch": Parts(
        (
            "layers.*.to_qk",
            "layers.*.to_v",
            "layers.*.to_out",
            "layers.*.up",
            "layers.*.down",
            "modalities.*.enter",
            "modalities.*.leave",
        ),
        ("modalities.*.leave",),
        ("autoencoder", "rotary_frequencies"),
        tables=("rotary_frequencies",),
    ),
}
"""By `model_type`: the families whose models can be distilled and fine-tuned."""


def check_paints(kind: str, name: str) -> None:
    """Raises UserError for a model (its `model_type`, and what the user calls it) that knows no pictures."""
    if not issubclass(family(kind).model, PictureFamily):
        raise UserError(
            f"model {name} only writes text: give it a picture side first (the verb extend), or name a model that "
            "paints"
        )


def within(name: str, modules: Collection[str]) -> bool:
    """Whether a weight or a layer of that dotted name is one of these modules, or in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def with_targets(spec: AdapterTraining, kind: str) -> AdapterTraining:
    """The spec with the layers of the family `kind`, where the run names none of its own."""
    if spec.targets != AdapterTraining.targets:
        return spec
    parts = PARTS[kind]
    return dataclasses.replace(spec, targets=parts.painting if spec.modality == "image" else parts.usual)
