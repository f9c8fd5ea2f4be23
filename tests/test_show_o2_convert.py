"""The official Show-o2 folder -> a model folder that paints, describes and writes; every tensor has its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from converted_tools import Cli, assert_paints, assert_refused, byte_tokenizer, convert_by_verb, dry_runs
from PIL import Image

from mlx_transfusion.errors import UserError
from mlx_transfusion.interleave import complete
from mlx_transfusion.model_io import flat_parameters, load
from mlx_transfusion.models.llama import LlamaConfig
from mlx_transfusion.models.show_o2 import ShowO2
from mlx_transfusion.models.show_o2_head import HeadConfig
from mlx_transfusion.models.vision_layers import VisionConfig
from mlx_transfusion.settings import GenerationSettings

try:
    from mlx_transfusion.convert import show_o2, show_o2_config, sources, synthetic, table, wan_vae
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import show_o2, show_o2_config, sources, synthetic, table, wan_vae  # type: ignore[no-redef]

FIXTURE = Path(__file__).parent / "fixtures" / "show-o2"
IDS: dict[str, int] = json.loads((FIXTURE / "inference_config.json").read_text())["token_ids"]


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes of ASCII as tokens, and the structural tokens where the golden has them."""
    return byte_tokenizer({show_o2_config.TOKENS[key]: i for key, i in IDS.items()}, 160, 176)


def official_folder(folder: Path) -> Path:
    """A folder as on the hub, with files of sizes beside it; ids are the tokenizer's."""
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("io.safetensors", "inference_config.json"))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official folder; tests do not write into it."""
    return official_folder(tmp_path_factory.mktemp("hub") / "show-o2-tiny")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, official: Path) -> Path:
    """What the verb `convert` made of it."""
    return convert_by_verb(official, out=tmp_path_factory.mktemp("models") / "show-o2")


# ---- the table ----


def test_the_table_gives_every_bit_back(official: Path) -> None:
    plan = show_o2.plan(sources.Source(official))
    theirs = {key + n: part.read(n) for key, part in plan.parts.items() for n in part.tensors}
    assert {e.source: e.shape for e in plan.entries if not e.optional} == {
        n: v.shape for n, v in theirs.items() if n != "showo.lm_head.weight"
    }
    back = table.restore(plan.entries, table.forward([e for e in plan.entries if e.target], theirs))
    films = {n for n in theirs if ".time_conv." in n}
    assert len(films) == 8
    assert back.keys() == theirs.keys() - films
    assert all(mx.array_equal(back[n], theirs[n]) for n in back)
    assert {e.reason for e in plan.entries if e.source in films} == {wan_vae.FILMS}


def test_the_public_sizes_come_out_of_the_same_table(official: Path) -> None:
    """The published 1.5B: 86.0 million numbers a block of the head, 2.83 billion in all."""
    source = sources.Source(official)
    tiny = show_o2_config.read_config(source, source.open())
    known = show_o2_config.KNOWN["Qwen2.5-1.5B-Instruct"]
    siglip = {k: v for k, v in show_o2_config.SIGLIP.items() if k not in ("image_size", "patch_size")}
    siglip |= {"num_hidden_layers": 26}
    public = replace(
        tiny, text=LlamaConfig(vocab_size=151936, qkv_bias=True, **known), vision=VisionConfig(**siglip),
        head=HeadConfig(), autoencoder=show_o2_config.WAN, grid_height=27, grid_width=27, position_rows=729,
    )  # fmt: skip
    entries = [e for e in show_o2.entries(public) if not e.optional]

    def count(part: str) -> int:
        return sum(prod(e.shape) for e in entries if e.source.startswith(part))

    assert count("diffusion_head_a.0.") == 85_999_744
    assert count("diffusion_head_b.") == 8_525_888
    assert round(count("") / 1e9, 2) == 2.83
    coder = [e.under(show_o2.CODER, show_o2.CODER) for e in wan_vae.entries(public.autoencoder)]
    assert round(sum(prod(e.shape) for e in coder) / 1e6) == 127
    assert {e.target: e.target_shape for e in [*entries, *coder] if e.target} == {
        name: value.shape for name, value in flat_parameters(ShowO2(public)).items()
    }
    assert public.layout.picture_tokens == 732
    assert (public.grid, public.resizes_positions) == ((27, 27), False)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published 1.5B's sizes: true names and shapes, and holes for numbers."""
    folder = tmp_path_factory.mktemp("real") / "show-o2-1.5B"
    folder.mkdir()
    sizes = {
        "_class_name": "Showo2Qwen2_5", "add_qk_norm": True, "add_time_embeds": True, "image_latent_dim": 16,
        "image_latent_height": 27, "image_latent_width": 27, "patch_size": 2, "num_diffusion_layers": 10,
        "llm_model_path": "Qwen/Qwen2.5-1.5B-Instruct", "llm_vocab_size": 151672,
        "clip_pretrained_model_path": "google/siglip-so400m-patch14-384",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "vae.safetensors").touch()
    synthetic.write_zeros(synthetic.plan_from_config(folder), mx.bfloat16, optional=False)
    return folder


def test_a_dry_run_of_the_published_size(cli: Cli, published: Path) -> None:
    facts = dry_runs(cli, published / "model.safetensors")
    counts = facts["whole"]["tensors"]
    assert counts["unused"] == {wan_vae.FILMS: 8}
    assert counts["used"] + 8 == counts["in the checkpoint"] == 1103
    assert facts["whole"]["parameters"] == pytest.approx(2.95e9, rel=3e-3)
    assert facts["4"]["weights"] == pytest.approx(2.346e9, rel=0.01)


def test_models_that_config_json_names_are_known(tmp_path: Path, official: Path) -> None:
    """Without their folders the published ones are known by name, and the head and autoencoder by heart."""
    folder = tmp_path / "hub"
    shutil.copytree(official, folder)
    for file in ("diffusion_head_config.json", "vae_config.json"):
        (folder / file).unlink()
    shutil.rmtree(folder / "llm")
    shutil.rmtree(folder / "siglip")
    data = json.loads((folder / "config.json").read_text())
    names = {
        "llm_model_path": "Qwen/Qwen2.5-7B-Instruct", "llm_vocab_size": 151672,
        "clip_pretrained_model_path": "google/siglip-so400m-patch14-384", "num_diffusion_layers": 10,
        "image_latent_dim": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data | names))
    source = sources.Source(folder)
    config = show_o2_config.read_config(source, source.open())
    assert (config.text.hidden_size, config.text.tie_word_embeddings, config.vocab_size) == (
        3584,
        False,
        151672,
    )
    assert (config.vision.num_hidden_layers, config.head) == (26, HeadConfig())
    assert config.autoencoder.z_dim == 16
    (folder / "config.json").write_text(json.dumps(data | names | {"llm_model_path": "Qwen/other"}))
    with pytest.raises(UserError, match=r"put the config\.json of that model into"):
        show_o2_config.read_config(sources.Source(folder), source.open())


# ---- what is wrong is said ----


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"add_qk_norm": False}, "add_qk_norm is False, and only true can be converted"),
        ("config.json", {"image_latent_width": "4"}, "image_latent_width is '4', expected a whole number"),
        ("config.json", {"num_diffusion_layers": 3}, "diffusion_head_a.2.mlp.down_proj.weight"),
        ("config.json", {"image_latent_dim": 8}, "image_latent_dim is 8"),
        ("llm/config.json", {"intermediate_size": 112}, "showo.model.layers.0.mlp.down_proj.weight"),
        ("siglip/config.json", {"vision_config": {"hidden_act": "gelu"}}, "expected gelu_pytorch_tanh"),
        ("vae_config.json", {"latent_std": [1.0]}, "latent_std has 1 values, expected z_dim (4)"),
    ],
)
def test_bad_configs(cli: Cli, tmp_path: Path, official: Path, file: str, change: dict, said: str) -> None:
    assert_refused(cli, official, tmp_path, file, change, said)


def test_missing_parts(tmp_path: Path, official: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(official, folder)
    shutil.move(folder / "vae.safetensors", tmp_path / "wan.safetensors")
    with pytest.raises(UserError, match="name it with --autoencoder"):
        show_o2.plan(sources.Source(folder))
    elsewhere = sources.Source(folder, autoencoder=tmp_path / "wan.safetensors")
    assert show_o2.plan(elsewhere).config["autoencoder"]["z_dim"] == 4
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json: name that of Qwen2\.5-Instruct"):
        show_o2.plan(elsewhere)


# ---- what it can do ----


def test_it_paints_as_its_authors_do(converted: Path) -> None:
    loaded = load(converted)
    settings = GenerationSettings().for_model(loaded.extra, loaded.name)
    assert (settings.sampler, settings.spacing, settings.steps) == ("ddim", "shifted", 49)
    assert settings.guidance == 7.5


def test_it_paints(converted: Path) -> None:
    assert_paints(load(converted), (64, 64), difference=1)


def test_the_verbs(cli: Cli, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    flags = ["--model", converted, "--steps", 2, "--seed", 3, "--spacing", "flow", "--sampler", "ddim"]
    assert cli("generate", "a red cat", *flags, "--output", out).code == 0
    assert Image.open(out).size == (64, 64)
    described = cli("describe", out, "--model", converted, "--max-tokens", 5, "--json")
    assert described.code == 0, described.err
    written = cli("complete", "red", "--model", converted, "--max-tokens", 4, "--json")
    assert written.code == 0, written.err


def test_a_dialogue_with_pictures(converted: Path) -> None:
    """Text, a user's picture, text: the interleaved loop reads them and goes on."""
    loaded = load(converted)
    picture = np.zeros((64, 64, 3), np.uint8)
    events = list(complete(loaded, ["red", picture, "cat"], 0, GenerationSettings(max_tokens=3, steps=2)))
    assert events


def test_describing_reads_what_the_official_program_reads(converted: Path) -> None:
    before, after = load(converted).pictures.describe_prompt()
    text = tokenizer()
    assert before == text.encode("system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n").ids
    assert after == text.encode("Describe this image in detail.\n<|im_start|>assistant\n").ids
    opening = text.encode("\n<|im_start|>assistant\n").ids
    assert load(converted).pictures.question_prompt([7, 8]) == (before, [7, 8, *opening])
    assert before.count(IDS["bos_id"]) == 1


def test_encode_and_decode_are_each_others_shapes(converted: Path) -> None:
    model = load(converted).pictures
    pixels = mx.random.uniform(shape=(2, 64, 64, 3), key=mx.random.key(1))
    patches = model.encode(pixels)
    assert patches.shape == (2, *model.latent_shape)
    assert model.decode(patches).shape == pixels.shape
    with pytest.raises(UserError, match="this model takes 64x64"):
        model.encode(pixels[:, :32])


def test_quantised(cli: Cli, official: Path, tmp_path: Path) -> None:
    """Language model, semantic layers and head lose bits; time, patches, fusion and autoencoder do not."""
    out = tmp_path / "small"
    assert cli("convert", official, "--output", out, "--quantize", 8, "--group-size", 32).code == 0
    scales = {n for n in mx.load(str(out / "model.safetensors")) if n.endswith("scales")}
    assert {"vision.layers.0.self_attn.q_proj.scales", "flow_head.layers.0.mlp.up_proj.scales"} <= scales
    assert not [
        n
        for n in scales
        if n.startswith(("autoencoder", "time", "vision.embed", "vision.fc", "flow_head.fc"))
    ]
    assert load(out).pictures.latent_shape == (16, 16)
