"""What the tests of converted families share: the golden's model, a tokenizer of bytes, what the verb must do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from mlx.utils import tree_flatten
from tokenizers import decoders, models, pre_tokenizers

from mlx_transfusion import generate_images
from mlx_transfusion.cli import main
from mlx_transfusion.model_io import Loaded
from mlx_transfusion.models.cache import KVCache
from mlx_transfusion.settings import GenerationSettings

try:
    from mlx_transfusion.convert import sources, table
except ModuleNotFoundError:  # only the tree is on the path, the package is not installed
    from convert import sources, table  # type: ignore[no-redef]

Cli = Callable[..., Any]


def convert_in_memory(
    converter: ModuleType, folder: Path, config_type: Any, model_type: Any, **fields: int
) -> Any:
    """The model of an official folder, with other values of its config's `fields`."""
    plan = converter.plan(sources.Source(folder))
    config = config_type.from_dict(json.loads(json.dumps(plan.config)) | fields)
    model = model_type(config)
    tensors = {key + name: part.read(name) for key, part in plan.parts.items() for name in part.tensors}
    model.load_weights(list(table.forward(plan.entries, tensors).items()))
    model.eval()
    return model


def assert_close(ours: mx.array, theirs: mx.array, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=tolerance)


def assert_forward_mode(model: Any, x: mx.array, cache: KVCache, *names: str) -> None:
    """The derivative of the velocity along (x, angle) is that of central differences; its gradient exists.

    names: weights whose gradient is not zero.
    """
    dx = mx.random.normal(x.shape, key=mx.random.key(1))
    angle, da = mx.array([0.8]), mx.array([1.0])

    def f(x: mx.array, a: mx.array) -> mx.array:
        return model.velocity(x, a, cache)

    _, (tangent,) = mx.jvp(f, [x, angle], [dx, da])
    h = 2e-3
    differences = (f(x + h * dx, angle + h * da) - f(x - h * dx, angle - h * da)) / (2 * h)
    assert float(mx.abs(tangent - differences).max()) < 5e-3 * float(mx.abs(differences).max())

    def through(weights: dict) -> mx.array:
        model.update(weights)
        return mx.square(mx.jvp(f, [x, angle], [dx, da])[1][0]).sum()

    weights = model.trainable_parameters()
    gradient = dict(tree_flatten(mx.grad(through)(weights)))
    model.update(weights)
    for name in names:
        assert float(mx.abs(gradient[name]).max()) > 0


def byte_tokenizer(special: dict[str, int], letters: int, size: int) -> tokenizers.Tokenizer:
    """Ids below `letters` for bytes of ASCII, the structural tokens at theirs, names for the rest of `size`."""
    known = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {chr(i) for i in range(256, 512)})
    vocab = {"\u0120": 0, "\u010a": 1} | {letter: 2 + i for i, letter in enumerate(known[: letters - 2])}
    taken = {*vocab.values(), *special.values()}
    vocab |= {f"<{i}>": i for i in range(size) if i not in taken}
    out = tokenizers.Tokenizer(models.BPE(vocab=vocab | special, merges=[]))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(list(special))
    return out


def convert_by_verb(*arguments: object, out: Path) -> Path:
    """`out`, which the verb `convert` wrote."""
    with pytest.raises(SystemExit) as done:
        main(["convert", *map(str, arguments), "--output", str(out)])
    assert done.value.code == 0
    return out


def dry_runs(cli: Cli, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What is foretold of the model as it is ("whole"), and quantised to 4 bits ("4")."""
    facts = {}
    for bits in ("whole", "4"):
        flags = [] if bits == "whole" else ["--quantize", bits]
        result = cli("convert", checkpoint, "--dry-run", "--json", *flags)
        assert result.code == 0, result.err
        facts[bits] = json.loads(result.out)
    return facts


def assert_refused(cli: Cli, official: Path, tmp_path: Path, file: str, change: dict, said: str) -> None:
    """With a changed config the verb stops, says why, and writes nothing."""
    folder = tmp_path / "hub"
    shutil.copytree(official, folder)
    data = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(data))
    result = cli("convert", folder, "--output", tmp_path / "out")
    assert (result.code, said in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


def assert_paints(loaded: Loaded, size: tuple[int, int], difference: int) -> np.ndarray:
    """A picture depends on its prompt and its seed, and not on what is painted beside it.

    Returns the pixels of "red cat" with seed 1. size: (height, width). difference: in levels, by which some pixel of
    other pictures differs.
    """
    settings = GenerationSettings(steps=3, guidance=2.0, batch_size=4)
    one, other, again = generate_images(loaded, ["red cat", "a dog", "red cat"], [1, 1, 2], settings)
    assert one.pixels.shape == (*size, 3)
    alone = generate_images(loaded, "red cat", 1, settings)[0]
    assert np.abs(one.pixels.astype(int) - alone.pixels).max() <= 1
    for different in (other, again):
        assert np.abs(one.pixels.astype(int) - different.pixels).max() > difference
    return alone.pixels
