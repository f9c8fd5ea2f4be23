"""The official BAGEL folder -> a model folder that paints, describes and writes; every tensor has its place."""

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

from mlx_transfusion import generate_images, trigflow
from mlx_transfusion.errors import UserError
from mlx_transfusion.interleave import complete, describe
from mlx_transfusion.model_io import flat_parameters, load
from mlx_transfusion.models.autoencoder_config import AutoencoderConfig
from mlx_transfusion.models.bagel import Bagel
from mlx_transfusion.models.bagel_config import BagelConfig
from mlx_transfusion.models.bagel_guidance import BagelGuidance, edit_contexts, flow_times, paint_flow
from mlx_transfusion.models.bagel_layers import BagelTextConfig
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.models.vision_layers import VisionConfig
from mlx_transfusion.painting import prefill
from mlx_transfusion.settings import GenerationSettings

try:
    from mlx_transfusion.convert import autoencoder, bagel, bagel_config, sources, synthetic, table
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import autoencoder, bagel, bagel_config, sources, synthetic, table  # type: ignore[no-redef]

FIXTURE = Path(__file__).parent / "fixtures" / "bagel"
BOS, EOS, BOI, EOI = 151, 152, 153, 154


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes of ASCII as tokens, and the structural tokens where the golden has them."""
    special = dict(zip(bagel_config.TOKENS.values(), (BOS, EOS, BOI, EOI), strict=True))
    return byte_tokenizer(special, BOS, BOS)


def official_folder(folder: Path) -> Path:
    """A folder as on the hub, but for the file of sizes that are public constants."""
    folder.mkdir()
    for file in FIXTURE.glob("*.*"):
        if file.name != "io.safetensors":
            shutil.copy(file, folder)
    sizes = json.loads((folder / "inference_config.json").read_text())
    del sizes["new_token_ids"]  # then they are found in the tokenizer
    (folder / "inference_config.json").write_text(json.dumps(sizes))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official folder; tests do not write into it."""
    return official_folder(tmp_path_factory.mktemp("hub") / "BAGEL-tiny")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, official: Path) -> Path:
    """What the verb `convert` made of it, set to small pictures."""
    out = convert_by_verb(official, out=tmp_path_factory.mktemp("models") / "bagel")
    file = out / "config.json"
    config = json.loads(file.read_text())
    sizes = {"image_height": 24, "image_width": 32, "input_height": 12, "input_width": 20}
    assert {name: config[name] for name in sizes} == {
        "image_height": 64, "image_width": 64, "input_height": 32, "input_width": 32,
    }  # fmt: skip
    file.write_text(json.dumps(config | sizes))
    return out


# ---- the table ----


def test_the_table_gives_every_bit_back(official: Path) -> None:
    plan = bagel.plan(sources.Source(official))
    theirs = {key + n: part.read(n) for key, part in plan.parts.items() for n in part.tensors}
    assert {e.source: e.shape for e in plan.entries} == {n: v.shape for n, v in theirs.items()}
    back = table.restore(plan.entries, table.forward(plan.entries, theirs))
    assert back.keys() == theirs.keys()
    assert all(mx.array_equal(back[n], theirs[n]) for n in theirs)


def test_the_public_sizes_come_out_of_the_same_table(official: Path) -> None:
    """The published 7B: 14.6 billion numbers, 29.21 GB of bfloat16 in ema.safetensors."""
    tiny = bagel_config.read_config(sources.Source(official))
    public = replace(
        tiny,
        text=BagelTextConfig(152064, 3584, 18944, 28, 28, 4),
        vision=VisionConfig(1152, 4304, 26, 16),
        autoencoder=AutoencoderConfig(
            latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        ),
        vision_patch_size=14, vision_table_side=70, latent_table_side=64,
        image_height=1024, image_width=1024, input_height=980, input_width=980,
    )  # fmt: skip
    entries = bagel.entries(public)
    assert round(2 * sum(prod(e.shape) for e in entries) / 1e9, 2) == 29.21
    both = [
        *entries,
        *(
            e.under(bagel.CODER, bagel.CODER)
            for e in autoencoder.entries(public.autoencoder, "original", flat=False)
        ),
    ]
    assert {e.target: e.target_shape for e in both} == {
        name: value.shape for name, value in flat_parameters(Bagel(public)).items()
    }
    assert public.latent_numbers == 64
    assert public.layout.picture_tokens == 4902


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published sizes: true names and shapes, and holes for numbers."""
    folder = tmp_path_factory.mktemp("real") / "BAGEL-7B-MoT"
    folder.mkdir()
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "hidden_act": "silu", "model_type": "qwen2",
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 980,
    }  # fmt: skip
    (folder / "llm_config.json").write_text(json.dumps(text))
    (folder / "vit_config.json").write_text(json.dumps(vision))
    tokenizer().save(str(folder / "tokenizer.json"))
    for name in (bagel.WEIGHTS, bagel.AUTOENCODER):
        (folder / name).touch()
    plan = synthetic.plan_from_config(folder)
    coder = BagelConfig.from_dict(json.loads(json.dumps(plan.config))).autoencoder
    spelt = [e.under(bagel.CODER, bagel.CODER) for e in autoencoder.entries(coder, "original", flat=False)]
    own = [e for e in plan.entries if not e.source.startswith(bagel.CODER)]
    synthetic.write_zeros(replace(plan, entries=(*own, *spelt)), mx.bfloat16)
    return folder


def test_a_dry_run_of_the_published_size(cli: Cli, published: Path) -> None:
    assert round((published / bagel.WEIGHTS).stat().st_size / 1e9, 2) == 29.21
    facts = dry_runs(cli, published)
    assert facts["whole"]["tensors"] == {"in the checkpoint": 1467, "used": 1467, "unused": {}}
    assert facts["whole"]["parameters"] == pytest.approx(14.69e9, rel=1e-3)
    assert facts["4"]["weights"] == pytest.approx(8.94e9, rel=0.01)


def test_without_a_file_of_sizes_the_published_ones_hold(tmp_path: Path, official: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(official, folder)
    (folder / "inference_config.json").unlink()
    vit = json.loads((folder / "vit_config.json").read_text()) | {"patch_size": 14}
    (folder / "vit_config.json").write_text(json.dumps(vit))
    config = bagel_config.read_config(sources.Source(folder))
    assert (config.image_height, config.input_width) == (1024, 980)
    assert config.autoencoder.block_out_channels == (128, 256, 512, 512)
    assert config.autoencoder.stem_channels is None
    assert (config.bos_token_id, config.eos_token_id, config.boi_token_id, config.eoi_token_id) == (
        BOS, EOS, BOI, EOI,
    )  # fmt: skip


# ---- what is wrong is said ----


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("llm_config.json", {"hidden_act": "gelu"}, 'hidden_act is "gelu", expected silu'),
        ("llm_config.json", {"rope_scaling": {"factor": 2}}, "BAGEL has none"),
        ("llm_config.json", {"hidden_size": "64"}, "expected int"),
        ("vit_config.json", {"hidden_act": "gelu"}, "expected gelu_pytorch_tanh"),
        ("vit_config.json", {"patch_size": 0}, "expected a positive whole number"),
        ("llm_config.json", {"intermediate_size": 96}, "has shape"),
    ],
)
def test_bad_configs(cli: Cli, tmp_path: Path, official: Path, file: str, change: dict, said: str) -> None:
    assert_refused(cli, official, tmp_path, file, change, said)


def test_missing_parts(tmp_path: Path, official: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(official, folder)
    (folder / "ae.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no ae\.safetensors: name the FLUX autoencoder"):
        bagel.plan(sources.Source(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json: name one with --tokenizer"):
        bagel_config.read_config(sources.Source(folder))


# ---- what it can do ----


def test_it_paints_as_its_authors_do(converted: Path) -> None:
    loaded = load(converted)
    settings = GenerationSettings().for_model(loaded.extra, loaded.name)
    assert (settings.sampler, settings.spacing, settings.steps) == ("ddim", "shifted", 49)
    assert settings.guidance == 4.0


def test_it_paints(converted: Path) -> None:
    loaded = load(converted)
    alone = assert_paints(loaded, (24, 32), difference=3)
    guided = GenerationSettings(steps=3, guidance=2.0, negative_prompt="a dog")
    assert np.abs(generate_images(loaded, "red cat", 1, guided)[0].pixels.astype(int) - alone).max() > 1


def test_the_verbs(cli: Cli, converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    flags = ["--model", converted, "--steps", 2, "--seed", 3, "--spacing", "flow", "--sampler", "ddim"]
    assert cli("generate", "a red cat", *flags, "--output", out).code == 0
    assert Image.open(out).size == (32, 24)
    described = cli("describe", out, "--model", converted, "--max-tokens", 5, "--json")
    assert described.code == 0, described.err
    asked = cli("describe", out, "--question", "Red?", "--model", converted, "--max-tokens", 5, "--json")
    assert asked.code == 0, asked.err
    assert asked.out != described.out
    written = cli("complete", "red", "--model", converted, "--max-tokens", 4, "--json")
    assert written.code == 0, written.err


def test_describing_reads_what_the_official_program_reads(converted: Path) -> None:
    """The picture's block at position 0, the question's block, and BOS."""
    loaded = load(converted)
    before, after = loaded.pictures.describe_prompt()
    assert loaded.pictures.question_prompt([7, 8]) == ([], [BOS, 7, 8, EOS, BOS])
    question = tokenizer().encode(bagel_config.QUESTION).ids
    assert (before, after) == ([], [BOS, *question, EOS, BOS])
    seen: list[list[int]] = []
    model = loaded.pictures
    extend, look = model.extend_text, model.read_picture

    def extend_text(ids: np.ndarray, lengths: np.ndarray, cache: KVCache) -> mx.array:
        seen.append(ids[0].tolist())
        return extend(ids, lengths, cache)

    def read_picture(pixels: mx.array, cache: KVCache) -> mx.array:
        assert cache.positions.tolist() == [0]
        return look(pixels, cache)

    model.extend_text, model.read_picture = extend_text, read_picture
    describe(loaded, np.zeros((12, 20, 3), np.uint8), settings=GenerationSettings(max_tokens=1))
    assert seen[0] == after
    seen.clear()
    list(complete(loaded, "red", settings=GenerationSettings(max_tokens=1)))
    assert seen[0] == [BOS, *tokenizer().encode("red").ids]


def test_a_painted_picture_is_read_in_two_blocks(converted: Path) -> None:
    model = load(converted).pictures
    assert isinstance(model, Bagel)
    cache = prefill(model, [model.image_prefix([5, 6])])
    x0 = mx.random.normal((1, *model.latent_shape), key=mx.random.key(0))
    model.extend_image(x0, cache)
    assert cache.positions.tolist() == [4 + 2]
    assert cache.lengths.tolist() == [4 + (12 + 2) + (15 + 2)]
    other = prefill(model, [model.image_prefix([5, 6])])
    model.extend_image(-x0, other)
    ids, length = np.array([[BOS]]), np.array([1])
    difference = model.extend_text(ids, length, cache) - model.extend_text(ids, length, other)
    assert float(mx.abs(difference).max()) > 0.1


def test_it_edits(converted: Path) -> None:
    """A picture and words become another picture, which depends on both."""
    model = load(converted).pictures
    assert isinstance(model, Bagel)
    noise = mx.random.normal((1, *model.latent_shape), key=mx.random.key(2))
    times, guidance = flow_times(4), BagelGuidance(2.0, 1.5, (0.0, 1.0))
    sources = [mx.random.uniform(shape=(1, 24, 32, 3), key=mx.random.key(seed)) for seed in (0, 1)]
    painted = []
    for pixels, ids in ((sources[0], [5, 6]), (sources[0], [7]), (sources[1], [5, 6])):
        contexts = edit_contexts(model, pixels, ids)
        assert [int(c.positions[0]) for c in contexts] == [2 + 2 + len(ids), 2, 2 + len(ids)]
        x0 = paint_flow(model, noise, times, *contexts, guidance=guidance)
        assert model.decode(x0).shape == (1, 24, 32, 3)
        painted.append(x0)
    for other in painted[1:]:
        assert float(mx.abs(painted[0] - other).max()) > 0.05


def test_the_verb_edits_as_the_official_program_does(cli: Cli, converted: Path, tmp_path: Path) -> None:
    """Its three contexts and its guidance, behind the samplers of all families."""
    loaded = load(converted)
    model = loaded.pictures
    assert isinstance(model, Bagel)
    levels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    pixels, ids = mx.array(levels[None].astype(np.float32) / 255), loaded.tokenizer.encode("red")
    ours = [
        model.read_edit(pixels, ids),
        model.read_edit(pixels, []),
        model.read_edit(None, model.unpictured(ids)),
    ]
    x, angle = mx.random.normal((1, *model.latent_shape), key=mx.random.key(2)), 1.2
    full, source, nothing = (model.velocity(x, mx.array([angle]), cache) for cache in ours)
    made = model.guided_edit(full, source, nothing, (2.0, 1.5), x, angle)
    state, _, t = trigflow.trigflow_to_flow(x, full, angle)
    flows = [model.flow(state, mx.array([t]), c) for c in edit_contexts(model, pixels, ids)]
    wanted = trigflow.flow_to_trigflow(state, BagelGuidance(2.0, 1.5)(*flows), t)[1]
    np.testing.assert_allclose(made, wanted, atol=1e-4)

    file, out = tmp_path / "source.png", tmp_path / "out.png"
    Image.fromarray(levels).save(file)
    flags = ["--model", converted, "--seed", 1, "--steps", 2, "--guidance", 2, "--image-guidance", 1.5]
    edited = cli("edit", file, "make it red", *flags, "--output", out)
    assert edited.code == 0, edited.err
    again = cli("edit", file, "--from", out, "--model", converted, "--output", tmp_path / "again.png")
    assert again.code == 0, again.err
    assert Image.open(out).size == (32, 24)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(tmp_path / "again.png")))


def test_encode_and_decode_are_each_others_shapes(converted: Path) -> None:
    model = load(converted).pictures
    pixels = mx.random.uniform(shape=(2, 24, 32, 3), key=mx.random.key(1))
    patches = model.encode(pixels)
    assert patches.shape == (2, *model.latent_shape)
    assert model.decode(patches).shape == pixels.shape


def test_quantised(cli: Cli, official: Path, tmp_path: Path) -> None:
    """Experts and vision lose bits, time, latents and the autoencoder do not."""
    out = tmp_path / "small"
    assert cli("convert", official, "--output", out, "--quantize", 8, "--group-size", 32).code == 0
    names = set(mx.load(str(out / "model.safetensors")))
    assert "decoder.layers.0.generate.q_proj.scales" in names
    assert "decoder.layers.0.understand.mlp.up_proj.scales" in names
    assert not [
        n for n in names if n.endswith("scales") and n.startswith(("autoencoder", "time", "vae2llm", "llm2"))
    ]
    assert load(out).pictures.latent_shape == (64, 16)
