"""InceptionV3 and CLIP of `evaluate`: equal to PyTorch's on random weights, through `convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from convert_package import module
from tiny_evaluation import write_evaluation
from tokenizers import models as token_models
from tokenizers import normalizers, pre_tokenizers

from mlx_transfusion.cli import main
from mlx_transfusion.errors import UserError
from mlx_transfusion.evaluation.networks import ClipFeatures, InceptionFeatures, centred, load_extractor
from mlx_transfusion.model_io import read_weights
from mlx_transfusion.models.inception import FEATURES, InceptionV3, average

torch = pytest.importorskip("torch", reason="PyTorch is the reference")
SIZE = 107
"""Of the pictures in InceptionV3 here: all blocks are passed, at a tenth of the cost."""
CAPTIONS = ["a red cat", "cat", "the blue star of a cat in the red hand"]


def converted(source: Path, folder: Path) -> Path:
    """What the verb makes of a checkpoint."""
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(source), "--output", str(folder)])
    assert exit_.value.code == 0
    return folder


# ---- InceptionV3 ----


@pytest.fixture(scope="module")
def inception() -> Any:
    from inception_reference import random_inception

    return random_inception()


@pytest.fixture(scope="module")
def inception_folder(tmp_path_factory: pytest.TempPathFactory, inception: Any) -> Path:
    folder = tmp_path_factory.mktemp("inception")
    torch.save(inception.state_dict(), folder / "weights.pth")
    return converted(folder / "weights.pth", folder / "converted")


def test_inception_is_that_of_fid(inception: Any, inception_folder: Path) -> None:
    pixels = np.random.default_rng(0).random((2, 40, 60, 3), dtype=np.float32)
    network = InceptionFeatures(inception_folder)._network
    ours = np.array(network(mx.array(pixels), SIZE))
    with torch.no_grad():
        theirs = inception(torch.tensor(pixels).permute(0, 3, 1, 2), SIZE).numpy()
    assert ours.shape == (2, FEATURES)
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.std())


def test_inception_converted_and_back(inception: Any, inception_folder: Path) -> None:
    entries = module("inception").entries()
    back = module("table").restore(entries, read_weights(inception_folder))
    theirs = {n: v for n, v in inception.state_dict().items() if not n.startswith("fc.") and v.ndim}
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(np.array(back[n]), v.numpy()) for n, v in theirs.items())


def test_inception_scales_bytes_and_tells_weights_apart(inception_folder: Path, monkeypatch: Any) -> None:
    extractor = load_extractor(inception_folder)
    seen: list[mx.array] = []
    monkeypatch.setattr(
        InceptionV3, "__call__", lambda self, x: seen.append(x) or mx.zeros((len(x), FEATURES))
    )
    extractor(np.full((1, 4, 4, 3), 255, np.uint8))
    assert seen[0].max().item() == 1.0
    assert extractor.fingerprint.startswith("inception_v3/")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_padding_has_no_part_in_the_mean(size: int) -> None:
    x = np.random.default_rng(1).random((2, size, size + 1, 3), dtype=np.float32)
    theirs = torch.nn.functional.avg_pool2d(
        torch.tensor(x).permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False
    )
    np.testing.assert_allclose(np.array(average(mx.array(x))), theirs.permute(0, 2, 3, 1), atol=1e-6)


def test_torchvisions_own_inception_is_refused(
    inception: Any, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    state = inception.state_dict() | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "inception_v3_google.pth")
    result = cli("convert", tmp_path / "inception_v3_google.pth", "--dry-run")
    assert result.code == 2
    assert "of 1000 classes, torchvision's own: FID is defined by the network of 1008" in result.err


# ---- CLIP ----


def write_clip(folder: Path, **text: Any) -> Any:
    """transformers' folder of a tiny random CLIP, with a tokenizer of words; returns the model."""
    transformers = pytest.importorskip("transformers", reason="transformers' CLIPModel is the reference")
    vocabulary = {w: i for i, w in enumerate(["a", "red", "cat", "the", "blue", "star", "of", "in", "hand"])}
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), 38)}
    vocabulary |= {"<|startoftext|>": 38, "<|endoftext|>": 39}
    tokenizer = tokenizers.Tokenizer(token_models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tower = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": 8,
                             "bos_token_id": 38, "eos_token_id": 39, "projection_dim": 12} | text,
        vision_config=tower | {"hidden_size": 24, "image_size": 16, "patch_size": 4, "projection_dim": 12},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("clip")
    model = write_clip(folder / "theirs")
    return model, converted(folder / "theirs", folder / "ours")


def vector(output: Any) -> np.ndarray:
    """transformers 5 wraps what version 4 returned."""
    return getattr(output, "pooler_output", output).detach().numpy()


def test_pictures_are_embedded_as_by_transformers(clip_folders: tuple[Any, Path]) -> None:
    model, folder = clip_folders
    extractor = load_extractor(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    mean, std = (
        np.array(v, np.float32)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    ready = torch.tensor((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    theirs = vector(model.get_image_features(pixel_values=ready))
    np.testing.assert_allclose(extractor(pixels), theirs, rtol=0, atol=1e-4)
    assert np.ptp(theirs, axis=0).max() > 0.1  # another picture is another vector


def test_texts_are_embedded_as_by_transformers(clip_folders: tuple[Any, Path]) -> None:
    model, folder = clip_folders
    ours = ClipFeatures(folder).texts(CAPTIONS)
    for caption, row in zip(CAPTIONS, ours, strict=True):
        words = {"a": 0, "red": 1, "cat": 2, "the": 3, "blue": 4, "star": 5, "of": 6, "in": 7, "hand": 8}
        ids = torch.tensor([[38, *[words[w] for w in caption.split()][:6], 39]])  # cut to the context of 8
        theirs = vector(model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids)))
        np.testing.assert_allclose(row[None], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 16), (20, 50), (41, 33), (7, 9)])
def test_pictures_are_prepared_as_by_transformers(shape: tuple[int, int]) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers' CLIPImageProcessor is the reference"
    )
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        size={"shortest_edge": 16}, crop_size=16, do_normalize=False, do_rescale=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = np.asarray(processor(pixels)["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_array_equal(centred(pixels, 16), theirs)


def test_other_forms_of_clip_are_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    write_clip(tmp_path / "gelu", hidden_act="gelu")
    result = cli("convert", tmp_path / "gelu", "--dry-run")
    assert result.code == 2
    assert "hidden_act is 'gelu', expected \"quick_gelu\"" in result.err
    write_clip(tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    result = cli("convert", tmp_path / "mute", "--dry-run")
    assert result.code == 2
    assert "no tokenizer.json" in result.err


# ---- both in `evaluate` ----


def test_evaluate_compares_pictures_with_captions(
    clip_folders: tuple[Any, Path], tiny_model_dir: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    folder = write_evaluation(tmp_path)
    common = ("evaluate", "--config", folder / "evaluate.toml", "--model", tiny_model_dir, "--quick")
    named = f"clip={clip_folders[1]}"
    result = cli(*common, "--set", named, "--output", tmp_path / "report.json")
    assert result.code == 0, result.err
    assert "CLIP score, painted pictures" in result.out
    pictures = json.loads((tmp_path / "report.json").read_text())["pictures"]["train"]
    for part in (pictures["clip"], pictures["clip_of_references"]):
        assert -1 <= part["mean_cosine"] <= 1
        assert set(part["text_of_picture"]) == {"1"}  # five pictures: no R@5
    assert pictures["clip"] != pictures["clip_of_references"]
    result = cli(*common, "--frechet", "--set", f"features={clip_folders[1]}", "--json")
    assert json.loads(result.out)["features"]["network"] == "CLIP"


def test_folders_that_hold_no_such_network(
    tiny_model_dir: Path, clip_folders: tuple[Any, Path], inception_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="model_type is 'transfusion', expected an InceptionV3 or CLIP"):
        load_extractor(tiny_model_dir)
    with pytest.raises(UserError, match=r"no config\.json: expected a folder"):
        load_extractor(tmp_path)
    with pytest.raises(UserError, match="model_type is 'inception_v3', expected a converted CLIP"):
        ClipFeatures(inception_folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in clip_folders[1].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read CLIP's tokenizer"):
        ClipFeatures(broken)
