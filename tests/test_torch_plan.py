"""`plan`: parameters, operations and memory against the real model; the verb; sharding over processes not there."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-transfusion[torch]')")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_tools import make_batch, objective  # noqa: E402

from mlx_transfusion import sequence  # noqa: E402
from mlx_transfusion.config import PRESETS, ModelConfig, preset  # noqa: E402
from mlx_transfusion.flops import document_pairs, forward_flops, step_flops, work_of  # noqa: E402
from mlx_transfusion.sequence import Image, Text  # noqa: E402
from mlx_transfusion.torch import memory as mem  # noqa: E402
from mlx_transfusion.torch.batch import to_example  # noqa: E402
from mlx_transfusion.torch.dry_run import dry_run  # noqa: E402
from mlx_transfusion.torch.initial import initialise  # noqa: E402
from mlx_transfusion.torch.model import Transfusion  # noqa: E402

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FULL = sorted((ROOT / "configs/full_scale").glob("*.toml"))
WIDE = {"hidden_size": 128, "intermediate_size": 352, "time_frequencies": 32}
UNET = {"patch_encoder": "unet", "unet_channels": 16, "unet_blocks": 2}


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "qk_norm": True, "patch_positions": "learned", "patch_skip": True}, UNET],
)
def test_parameters(changes: dict[str, Any], tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, **changes)
    with torch.device("meta"):
        assert mem.sizes(config).total == sum(p.numel() for p in Transfusion(config).parameters())


@pytest.mark.parametrize("name", [*PRESETS, "7b-unet"])
def test_parameters_of_the_papers_sizes(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        assert mem.sizes(config).total == sum(p.numel() for p in Transfusion(config).parameters())


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "patch_skip": True}, UNET], ids=str)
def test_operations_within_two_percent(changes: dict[str, Any], tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, **WIDE, **changes)
    model = Transfusion(config)
    initialise(model, config, 0)
    batch = make_batch(config)
    example = to_example(batch, config, CPU)
    work = work_of(batch.packed, dense=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = objective(model, example)
        forward = counter.get_total_flops()
        loss.backward()
    assert forward_flops(config, work) == pytest.approx(forward, rel=0.02)
    assert step_flops(config, work) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_pairs_of_a_document(tiny_config: ModelConfig) -> None:
    n = tiny_config.patches_per_image
    document = sequence.document([Text((7, 8, 9)), Image(0, n)], tiny_config)
    length = sequence.length(document)
    packed = sequence.pack([document], length)
    assert work_of(packed).pairs == document_pairs(length, n)
    assert work_of(packed, bidirectional=False).pairs == document_pairs(length)


def test_pairs_are_those_of_the_mask(tiny_config: ModelConfig) -> None:
    packed = make_batch(tiny_config).packed
    mask = sequence.attention_mask(packed.document, packed.image)
    padding = int((packed.document < 0).sum())  # which sees itself, and is no work
    assert padding > 0
    assert work_of(packed).pairs == np.count_nonzero(mask) - padding
    assert work_of(packed).positions == mask.shape[0] * mask.shape[-1] - padding


@pytest.mark.parametrize("name", ["0.16b", "7b-unet"])
def test_a_dry_run_counts_the_shards(name: str) -> None:
    config, processes = preset(name), 64
    found = dry_run(config, processes, "bfloat16")
    whole = mem.sizes(config).total
    assert found["parameters"] == whole
    assert found["on_device"] == 0
    total = found["weights"] + found["gradients"] + found["optimizer"] + found["average"]
    assert total == pytest.approx(mem.STATE_BYTES * whole / processes, rel=0.01)


@pytest.mark.parametrize("rank", [0, 63])
def test_a_dry_run_with_shared_blocks(rank: int) -> None:
    """Eight GPUs share the blocks of the 7B model; what is no block is cut over the others alone."""
    config, processes = preset("7b"), 64
    found = dry_run(config, processes, "bfloat16", rank=rank, tensor=8)
    n = mem.sizes(config)
    blocks = config.num_hidden_layers * n.block
    assert found["parameters"] == n.total
    assert found["on_device"] == 0
    assert found["weights"] == pytest.approx(4 * (blocks + 8 * (n.total - blocks)) / processes, rel=0.01)
    need = mem.memory(config, mem.Part(4096, 2048, 8), processes, tensor=8)
    state = found["weights"] + found["optimizer"] + found["average"]
    assert need.state == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize("config", FULL, ids=lambda p: p.stem)
def test_the_papers_configs_have_its_numbers(config: Path, cli: Callable[..., Any]) -> None:
    done = cli("plan", config, "--gpus", 64, "--json", "--set", "accumulate=1")
    assert done.code == 0, done.err
    p = json.loads(done.out)
    large = config.stem.endswith("2t")
    assert p["step_positions"] == pytest.approx(4e6 if large else 2e6, rel=0.06)
    assert p["run_tokens"] == pytest.approx(2e12 if large else 0.5e12, rel=0.06)
    patches = p["step_pictures"] * 256
    assert patches == pytest.approx(p["step_positions"] / 2, rel=0.1)  # 1 : 1
    six_n_d = 6 * p["parameters"] * p["run_tokens"]
    assert 0.8 * six_n_d < p["run_flops"] < 1.3 * six_n_d


def test_the_verb_for_people(cli: Callable[..., Any]) -> None:
    done = cli("plan", ROOT / "configs/full_scale/7b.toml", "--gpus", 256, "--gpu", "h100", "--price", 2)
    assert done.code == 0, done.err
    assert "6.755 billion" in done.out or "6.7" in done.out
    for wrong, word in (
        (["--gpu", "abacus"], "abacus"),
        (["--mfu", "2"], "--mfu"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "12", "--tensor", "12"], "num_attention_heads"),
    ):
        done = cli("plan", ROOT / "configs/full_scale/7b.toml", *wrong)
        assert done.code == 2
        assert word in done.err


def test_a_plan_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["mlx"] = sys.modules["mlx.core"] = None
import mlx_transfusion.torch.plan as plan
from mlx_transfusion.training.config import load_train_config
plan.plan(load_train_config("configs/full_scale/0.16b.toml"), plan.Assumptions(8))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
