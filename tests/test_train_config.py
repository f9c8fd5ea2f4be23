from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_training import TOML

from mlx_transfusion.errors import UserError
from mlx_transfusion.training.config import TrainConfig, load_train_config, model_config

SPECIAL = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "unk", "boi", "eoi"))}


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(TOML)
    return path


def test_the_file_and_its_defaults(toml: Path) -> None:
    config = load_train_config(toml)
    assert (config.steps, config.batch_size, config.optimizer.learning_rate) == (6, 6, 3e-3)
    assert config.data.train[0].weight == 2.0
    assert config.data.train[1].images is None
    # the paper's values where the file says nothing
    assert (config.image_loss_weight, config.data.caption_first, config.accumulate) == (5.0, 0.8, 1)
    assert (config.optimizer.betas, config.optimizer.weight_decay, config.optimizer.clip) == (
        (0.9, 0.95),
        0.1,
        1.0,
    )
    assert config.diffusion.image_first_limit == pytest.approx(3.14159265 / 4)


def test_file_names_are_relative_to_the_toml_and_output_is_not(toml: Path) -> None:
    config = load_train_config(toml)
    assert config.tokenizer == str(toml.parent / "tokenizer.model")
    assert config.data.train[0].rows == str(toml.parent / "pairs.jsonl")
    assert config.data.train[0].images == str(toml.parent / "pictures")
    assert config.output == "runs"
    absolute = load_train_config(toml, ["tokenizer=/somewhere/t.model"])
    assert absolute.tokenizer == "/somewhere/t.model"


def test_init_is_a_folder_beside_the_toml_or_a_name(toml: Path) -> None:
    assert load_train_config(toml, ["init=org/name"]).init == "org/name"
    (toml.parent / "start").mkdir()
    assert load_train_config(toml, ["init=start"]).init == str(toml.parent / "start")


def test_overrides(toml: Path) -> None:
    config = load_train_config(
        toml,
        ["optimizer.learning_rate=1e-3", "output=else/where", "sample.prompts=['a', 'b']", "model.qk_norm=true",
         "diffusion.high_noise_share=[0.5, 0.25]", "init='5'", "data.train.0.weight=2.5"],
    )  # fmt: skip
    assert config.optimizer.learning_rate == 1e-3
    assert config.output == "else/where"
    assert config.sample.prompts == ("a", "b")
    assert config.model["qk_norm"] is True
    assert config.diffusion.high_noise_share == (0.5, 0.25)
    assert config.init == "5"
    assert config.data.train[0].weight == 2.5


FAULTS: list[tuple[str, str]] = [
    ("optimizer.learning_rat=1", r'optimizer: unknown key "learning_rat"; did you mean "learning_rate"\?'),
    ("stepz=1", r'unknown key "stepz"; did you mean "steps"\?'),
    ("data.captoin_drop=0.5", r'data: unknown key "captoin_drop"; did you mean "caption_drop"\?'),
    ("steps=many", "steps: expected int, found 'many'"),
    ("steps=1.5", "steps: expected int, found 1.5"),
    ("steps=0", "steps is 0, expected 1 or more"),
    ("batch_size=-1", "batch_size is -1"),
    ("keep=0", "keep is 0"),
    ("valid_batches=0", "valid_batches is 0"),
    ("accumulate=7", "accumulate is 7, expected at most batch_size 6"),
    ("seed=-1", "seed is -1, expected 0 to"),
    ("ema=1.5", "ema is 1.5, expected 0 to 1"),
    ("ema=nan", "ema is nan"),
    ("dtype=float16", 'dtype is "float16", expected one of float32, bfloat16'),
    ("optimizer.name=lion", 'optimizer.name is "lion", expected one of adamw, muon'),
    ("optimizer.betas=[0.9]", "betas: expected a list of 2"),
    ("optimizer.betas=[0.9, 1.1]", r"optimizer.betas\[1\] is 1.1"),
    ("optimizer.warmup=-5", "optimizer.warmup is -5"),
    ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate is -0.001"),
    ("optimizer.clip=-1", "optimizer.clip is -1"),
    ("diffusion.distribution=normal", 'diffusion.distribution is "normal"'),
    ("diffusion.high_noise_share=[0.5]", "high_noise_share: expected a list of 2"),
    ("diffusion.high_noise_share=[0.5, 2]", r"high_noise_share\[1\] is 2"),
    ("diffusion.image_first_limit=2.0", "image_first_limit is 2.0, expected 0 to 1.5708"),
    ("data.caption_first=1.1", "data.caption_first is 1.1, expected 0 to 1"),
    ("data.flip=nan", "data.flip is nan"),
    ("data.threads=0", "data.threads is 0"),
    ("data.train=[]", "data.train is empty"),
    ("data.train=[{images='x'}]", r"data\.train\[0\]: give it rows or shards"),
    ("data=3", "data: expected a table of keys"),
    ("model=3", "model: expected a table of keys"),
    ("sample.every=5", "sample.every needs sample.prompts"),
    ("nonsense", '--set "nonsense": expected key.path=value'),
    ("=3", "expected key.path=value"),
    ("steps.x=3", "steps is not a table"),
    ("data.train.7.rows=x", "7 is not a table"),
    ("data.train.first.rows=x", "first is not a table"),
    ("data.train.rows=x", "train is a list: name one of its tables"),
]


@pytest.mark.parametrize(("override", "message"), FAULTS)
def test_faults_are_one_line_that_names_the_key(toml: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_train_config(toml, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"steps = = 3", b"\xff\xfe", b"[a]\n[a]"])
def test_a_file_that_is_no_toml(toml: Path, content: bytes) -> None:
    toml.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.toml: not valid TOML"):
        load_train_config(toml)


def test_a_missing_file_and_missing_tables(toml: Path) -> None:
    with pytest.raises(UserError, match="cannot read the training config: No such file"):
        load_train_config(toml.with_name("no.toml"))
    toml.write_text('output = "x"\ntokenizer = "t"\n[model]\n')
    with pytest.raises(UserError, match='key "data" is missing'):
        load_train_config(toml)
    with pytest.raises(UserError, match="cannot read the training config"):
        load_train_config(toml.parent)


def test_the_record_survives_json(toml: Path) -> None:
    """What a checkpoint records reads back as the same config."""
    from mlx_transfusion.config import from_dict

    config = load_train_config(toml, ["optimizer.learning_rate=0.1", "diffusion.high_noise_share=[0.1, 0.3]"])
    assert from_dict(TrainConfig, json.loads(json.dumps(config.to_dict())), "record") == config


def test_the_model_of_a_run(toml: Path) -> None:
    config = load_train_config(toml)
    model = model_config(config, 288, SPECIAL)
    assert (model.vocab_size, model.hidden_size, model.boi_token_id) == (288, 32, 4)

    def other(**keys: Any) -> TrainConfig:
        return TrainConfig("o", "t", config.data, keys)

    base = model_config(
        other(preset="0.16b", image_channels=3, image_mean=[0, 0, 0], num_hidden_layers=3), 288, SPECIAL
    )
    assert (base.hidden_size, base.num_hidden_layers, base.prediction, base.vocab_size) == (
        768,
        3,
        "epsilon",
        288,
    )
    with pytest.raises(UserError, match=r'\[model\]: preset "9b" is unknown'):
        model_config(other(preset="9b"), 288, SPECIAL)
    with pytest.raises(UserError, match=r'\[model\]: unknown key "hiden_size"; did you mean "hidden_size"'):
        model_config(other(preset="0.16b", hiden_size=3), 288, SPECIAL)
    with pytest.raises(UserError, match=r'\[model\]: key "hidden_size" is missing'):
        model_config(other(), 288, SPECIAL)
