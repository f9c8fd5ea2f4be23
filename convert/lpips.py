"""LPIPS by the names of the package `lpips` (`LPIPS(net="vgg").state_dict()`): an autoencoder's perceptual loss."""

from __future__ import annotations

from mlx_transfusion.models.lpips import LPIPS, TRUNKS, LPIPSConfig

from .sources import Source
from .table import WHOLE, Card, Converter, Entry, Plan, conv2d, unused

MARK = "lin0.model.1.weight"


def entries(network: str) -> list[Entry]:
    """The table of names and shapes of the checkpoint."""
    table = [
        unused(f"scaling_layer.{n}", (1, 3, 1, 1), "the same for all", optional=True)
        for n in ("shift", "scale")
    ]
    channels = 3
    for i, group in enumerate(TRUNKS[network].groups):
        for j, layer in enumerate(group):
            source = f"net.slice{i + 1}.{layer.place}"
            table += conv2d(source, f"groups.{i}.{j}", layer.outputs, channels, layer.kernel)
            channels = layer.outputs
        shape = (1, channels, 1, 1)
        table.append(Entry(f"lin{i}.model.1.weight", f"lins.{i}", shape))
        table.append(
            Entry(f"lins.{i}.model.1.weight", None, shape, optional=True, same_as=f"lin{i}.model.1.weight")
        )
    return table


def detect(source: Source) -> bool:
    """By the name of its first channel weights."""
    return MARK in source.names()


def plan(source: Source) -> Plan:
    """The whole conversion. VGG's second convolution tells it from AlexNet."""
    checkpoint = source.open()
    config = LPIPSConfig("vgg" if "net.slice1.2.weight" in checkpoint.tensors else "alex")
    return Plan(
        "lpips",
        config.to_dict(),
        {"": checkpoint},
        tuple(entries(config.network)),
        {},
        Card(
            "lpips",
            "bsd-2-clause",
            url="https://github.com/richzhang/PerceptualSimilarity",
            pipeline="image-classification",
        ),
        lambda path: WHOLE,
        model=LPIPS(config),
    )


CONVERTER = Converter("lpips", "LPIPS (VGG16 or AlexNet), for an autoencoder's perceptual loss", detect, plan)
