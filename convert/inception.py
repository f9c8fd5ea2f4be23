"""InceptionV3 of the Frechet inception distance (`pt_inception-2015-12-05-6726825d.pth`), for `evaluate`."""

from __future__ import annotations

from mlx_transfusion.errors import UserError
from mlx_transfusion.model_io import flat_parameters
from mlx_transfusion.models.inception import CLASSES, FEATURES, InceptionConfig, InceptionV3

from .sources import Source
from .table import CONV2D, WHOLE, Card, Converter, Entry, Plan, unused

MARK = "Mixed_7c.branch_pool.conv.weight"
CLASSIFIER = "behind the features"


def entries() -> list[Entry]:
    """The table of names and shapes of the checkpoint."""
    table = [
        unused("fc.weight", (CLASSES, FEATURES), CLASSIFIER),
        unused("fc.bias", (CLASSES,), CLASSIFIER),
    ]
    for name, value in flat_parameters(InceptionV3()).items():
        if value.ndim == 4:
            out, height, width, channels = value.shape
            table.append(Entry(name, name, (out, channels, height, width), CONV2D))
        else:
            table.append(Entry(name, name, value.shape))
        if name.endswith("bn.weight"):
            counter = name.removesuffix("weight") + "num_batches_tracked"
            table.append(unused(counter, (), "only training counts", optional=True))
    return table


def detect(source: Source) -> bool:
    """By the name of its last block's convolution."""
    return MARK in source.names()


def plan(source: Source) -> Plan:
    """The whole conversion. Raises UserError for torchvision's own weights, which FID is not defined by."""
    checkpoint = source.open()
    classes = checkpoint.tensors["fc.weight"].shape[0] if "fc.weight" in checkpoint.tensors else CLASSES
    if classes != CLASSES:
        raise UserError(
            f"{checkpoint.where}: an InceptionV3 of {classes} classes, torchvision's own: FID is defined by the "
            f"network of {CLASSES}, pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    return Plan(
        "inception",
        InceptionConfig().to_dict(),
        {"": checkpoint},
        tuple(entries()),
        {},
        Card(
            "pytorch-fid",
            "apache-2.0",
            url="https://github.com/mseitzer/pytorch-fid",
            pipeline="image-classification",
        ),
        lambda path: WHOLE,
        model=InceptionV3(),
    )


CONVERTER = Converter("inception", "InceptionV3 of FID (pytorch-fid's weights), for evaluate", detect, plan)
