"""The InceptionV3 of 2015-12-05 that FID is defined with; its tensors have the names of pytorch-fid's file.

A block is some chains of convolutions and a pooling side by side, and their channels one after the other. Two things differ from the
InceptionV3 of torchvision: average pooling does not count the padding, and the last block pools the maximum. There are 1008 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 1008
Kernel = int | tuple[int, int]


class Step(NamedTuple):
    """A convolution of a chain."""

    name: str
    channels: int
    kernel: Kernel = 1
    stride: int = 1
    """With stride 1 it keeps the size, with 2 nothing is padded."""


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out, H', W']."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Chains side by side; those that begin with the same steps share them.

    Args:
        channels: that come in.
        pool: what the last branch does: average or maximum of 3 x 3 cells, then a convolution to ``pooled`` channels; or the maximum at
            half the resolution.
    """

    def __init__(self, channels: int, chains: Sequence[Sequence[Step]], pool: Literal["average", "max", "halve"], pooled: int = 0) -> None:
        super().__init__()
        self.chains, self.pool = [[step.name for step in chain] for chain in chains], pool
        for chain in chains:
            inputs = channels
            for step in chain:
                wide = step.kernel if isinstance(step.kernel, tuple) else (step.kernel, step.kernel)
                padding = (wide[0] // 2, wide[1] // 2) if step.stride == 1 else 0
                if step.name not in self._modules:
                    self.add_module(step.name, Conv(inputs, step.channels, step.kernel, step.stride, padding))
                inputs = step.channels
        if pooled:
            self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H, W], or half the resolution."""
        outputs, done = [], dict[str, Tensor]()
        for chain in self.chains:
            current = x
            for name in chain:
                if name not in done:
                    done[name] = self.get_submodule(name)(current)
                current = done[name]
            outputs.append(current)
        if self.pool == "halve":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def _a(channels: int, pooled: int) -> Block:
    return Block(
        channels,
        [
            [Step("branch1x1", 64)],
            [Step("branch5x5_1", 48), Step("branch5x5_2", 64, 5)],
            [Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3)],
        ],
        "average",
        pooled,
    )


def _b(channels: int) -> Block:
    double = [Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3, 2)]
    return Block(channels, [[Step("branch3x3", 384, 3, 2)], double], "halve")


def _c(inner: int) -> Block:
    row, column = (1, 7), (7, 1)
    kernels: tuple[Kernel, ...] = (1, column, row, column)
    single = [Step("branch7x7_1", inner), Step("branch7x7_2", inner, row), Step("branch7x7_3", 192, column)]
    double = [Step(f"branch7x7dbl_{number}", inner, kernel) for number, kernel in enumerate(kernels, 1)]
    return Block(768, [[Step("branch1x1", 192)], single, [*double, Step("branch7x7dbl_5", 192, row)]], "average", 192)


def _d() -> Block:
    single = [Step("branch3x3_1", 192), Step("branch3x3_2", 320, 3, 2)]
    wide = [Step("branch7x7x3_1", 192), Step("branch7x7x3_2", 192, (1, 7)), Step("branch7x7x3_3", 192, (7, 1))]
    return Block(768, [single, [*wide, Step("branch7x7x3_4", 192, 3, 2)]], "halve")


def _e(channels: int, pool: Literal["average", "max"]) -> Block:
    single, double = Step("branch3x3_1", 384), [Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, 3)]
    row, column = (1, 3), (3, 1)
    chains = [
        [Step("branch1x1", 320)],
        [single, Step("branch3x3_2a", 384, row)],
        [single, Step("branch3x3_2b", 384, column)],
        [*double, Step("branch3x3dbl_3a", 384, row)],
        [*double, Step("branch3x3dbl_3b", 384, column)],
    ]
    return Block(channels, chains, pool, 192)


class FidInception(nn.Module):
    """[B, 3, 299, 299] in [-1, 1] -> Mixed_6d [B, 768, 17, 17] and the last pooling layer [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        self.Mixed_7a = _d()
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "max")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two layers that images are compared by."""
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        middle: Tensor = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(middle))))
        return middle, x.mean((2, 3))
