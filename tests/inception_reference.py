"""InceptionV3 of the Frechet inception distance in PyTorch, layer for layer.

Written from the figures of arXiv 1512.00567 for comparison with ours; the names are torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Unit(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def unit(inputs: int, outputs: int, h: int = 1, w: int = 1, stride: int = 1, padded: bool = True) -> Unit:
    return Unit(inputs, outputs, (h, w), stride, (h // 2, w // 2) if padded else (0, 0))


def mean3(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    def __init__(self, n: int, pooled: int):
        super().__init__()
        self.branch1x1 = unit(n, 64)
        self.branch5x5_1, self.branch5x5_2 = unit(n, 48), unit(48, 64, 5, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = unit(n, 64), unit(64, 96, 3, 3)
        self.branch3x3dbl_3 = unit(96, 96, 3, 3)
        self.branch_pool = unit(n, pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(mean3(x))], 1
        )


class BlockB(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.branch3x3 = unit(n, 384, 3, 3, 2, False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = unit(n, 64), unit(64, 96, 3, 3)
        self.branch3x3dbl_3 = unit(96, 96, 3, 3, 2, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    def __init__(self, n: int, c: int):
        super().__init__()
        self.branch1x1 = unit(n, 192)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = (
            unit(n, c),
            unit(c, c, 1, 7),
            unit(c, 192, 7, 1),
        )
        self.branch7x7dbl_1, self.branch7x7dbl_2 = unit(n, c), unit(c, c, 7, 1)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = unit(c, c, 1, 7), unit(c, c, 7, 1)
        self.branch7x7dbl_5 = unit(c, 192, 1, 7)
        self.branch_pool = unit(n, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for i in range(1, 6):
            double = getattr(self, f"branch7x7dbl_{i}")(double)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean3(x))], 1)


class BlockD(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = unit(n, 192), unit(192, 320, 3, 3, 2, False)
        self.branch7x7x3_1, self.branch7x7x3_2 = unit(n, 192), unit(192, 192, 1, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = unit(192, 192, 7, 1), unit(192, 192, 3, 3, 2, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    def __init__(self, n: int, maximum: bool):
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = unit(n, 320)
        self.branch3x3_1 = unit(n, 384)
        self.branch3x3_2a, self.branch3x3_2b = unit(384, 384, 1, 3), unit(384, 384, 3, 1)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = unit(n, 448), unit(448, 384, 3, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = unit(384, 384, 1, 3), unit(384, 384, 3, 1)
        self.branch_pool = unit(n, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else mean3(x)
        return torch.cat(
            [
                self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled),
            ], 1,
        )  # fmt: skip


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = unit(3, 32, 3, 3, 2, False), unit(32, 32, 3, 3, 1, False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = unit(32, 64, 3, 3), unit(64, 80)
        self.Conv2d_4a_3x3 = unit(80, 192, 3, 3, 1, False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, False), BlockE(2048, True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 2048]."""
        x = 2 * F.interpolate(x, (size, size), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def random_inception(seed: int = 0) -> Inception:
    """Weights under which signals keep their size, and statistics that are not those of a start."""
    torch.manual_seed(seed)
    model = Inception().eval()
    for name, value in model.state_dict().items():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.7, 1.4)
        elif name.endswith(("running_mean", "bn.bias")):
            value.normal_(0, 0.1)
    return model
