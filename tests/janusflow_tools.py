"""A tiny JanusFlow as its makers would publish it: numbers of the official code, weights, and a tokenizer."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import mlx.core as mx
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mlx_transfusion.model_io import flat_parameters
from mlx_transfusion.models.autoencoder import AutoencoderConfig, AutoencoderKL
from mlx_transfusion.models.convnext import ConvNextConfig
from mlx_transfusion.models.janusflow import JanusFlow
from mlx_transfusion.models.janusflow_config import JanusFlowConfig
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.models.siglip import SiglipConfig

try:
    from mlx_transfusion.convert import autoencoder, janusflow, table
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import autoencoder, janusflow, table  # type: ignore[no-redef]

FIXTURE = Path(__file__).parent / "fixtures" / "janusflow"
LATENT = 8
BOS, EOS, PAD, PLACEHOLDER, BOI, EOI, GENERATION = 0, 1, 155, 156, 157, 158, 159


@cache
def golden() -> dict[str, mx.array]:
    """Inputs and outputs of the official code, in PyTorch's layouts."""
    return mx.load(str(FIXTURE / "io.safetensors"))


@cache
def weights() -> dict[str, mx.array]:
    """The tiny model under the official names, in PyTorch's layouts."""
    return mx.load(str(FIXTURE / "model.safetensors"))


def config() -> JanusFlowConfig:
    """The tiny model's sizes, written out (the converter reads the same from the official config)."""
    return JanusFlowConfig(
        text=LlamaConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
            vocab_size=160, rms_norm_eps=1e-6, max_position_embeddings=512,
        ),
        vision=SiglipConfig(
            image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128,
        ),
        painting=ConvNextConfig(latent_channels=4, latent_size=LATENT, patch_size=2, channels=32, blocks=2),
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, boi_token_id=BOI, eoi_token_id=EOI,
        placeholder_token_id=PLACEHOLDER, generation_token_id=GENERATION,
    )  # fmt: skip


@cache
def model() -> JanusFlow:
    """The tiny model with its official weights; tests do not change it."""
    out = JanusFlow(config())
    out.load_weights(list(table.forward(janusflow.entries(config()), weights()).items()), strict=True)
    out.eval()
    mx.eval(out.parameters())
    return out


def channels_last(x: mx.array) -> mx.array:
    """PyTorch's [..., C, H, W] -> [..., H, W, C]."""
    return mx.moveaxis(x, -3, -1)


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes of ASCII as tokens, and the structural tokens where the golden has them."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {chr(i) for i in range(256, 512)})
    vocab = {"<s>": BOS, "</s>": EOS, "\u0120": 2, "\u010a": 3}
    vocab |= {letter: 4 + i for i, letter in enumerate(letters[: PAD - 4])}
    vocab |= {f"<{i}>": i for i in range(len(vocab), PAD)}
    vocab |= {
        "<｜▁pad▁｜>": PAD, "<image_placeholder>": PLACEHOLDER, "<begin_of_image>": BOI, "<end_of_image>": EOI,
        "<｜begin▁of▁generation｜>": GENERATION,
    }  # fmt: skip
    out = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens([name for name, i in vocab.items() if i < 2 or i >= PAD])
    return out


def official_folder(folder: Path) -> Path:
    """The tiny checkpoint as a folder of the hub."""
    folder.mkdir(parents=True)
    shutil.copy(FIXTURE / "model.safetensors", folder)
    official = json.loads((FIXTURE / "config.json").read_text())
    official["vision_gen_enc_config"]["params"]["latent_size"] = LATENT
    (folder / "config.json").write_text(json.dumps(official))
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})
    )
    return folder


CODER = AutoencoderConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    scaling_factor=0.13025,
)
"""A tiny autoencoder of SDXL's kind: two pixels for one latent element along each side."""


def autoencoder_folder(folder: Path) -> Path:
    """A random one as a folder of diffusers."""
    mx.random.seed(3)
    ours = {
        name: value + 0.05 * mx.random.normal(value.shape)
        for name, value in flat_parameters(AutoencoderKL(CODER)).items()
    }
    theirs = table.restore(autoencoder.entries(CODER), ours)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "diffusion_pytorch_model.safetensors"), theirs)
    fields = CODER.to_dict() | {"_class_name": "AutoencoderKL", "act_fn": "silu"}
    del fields["model_type"]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
