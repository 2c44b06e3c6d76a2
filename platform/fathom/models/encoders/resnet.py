"""CIFAR-10's residual networks (He et al., 2016, section 4.2), with exits between blocks.

Three groups of n blocks of two 3x3 convolutions, of 16, 32 and 64 channels on maps of 32, 16 and 8
pixels a side: ResNet-(6n+2). Shortcuts are the paper's option A: where the map shrinks, every other
pixel, and zeros for the new channels; they hold no weights and cost no multiplication.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fathom.models.encoders.base import Encoder, ExitHead, Flops, State
from fathom.models.errors import ModelError

CHANNELS = (16, 32, 64)
SIDE = 32
"""Pixels of an image's side."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""By which the published weights' training normalized the channels of pixels in [0, 1]."""

_HEAD_CHANNELS, _HEAD_SIDE = 64, 8


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the map's side, or halves it with stride 2."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv_flops(inputs: int, outputs: int, side: int) -> float:
    """Operations of a 3x3 convolution whose output has this side."""
    return 2.0 * 9 * inputs * outputs * side * side


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = conv3x3(inputs, outputs, self.stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, inputs, side, side] -> [rows, outputs, side / stride, side / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            more = (self.outputs - self.inputs) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
        return F.relu(out + x)

    def flops(self) -> float:
        """Operations of one row."""
        side = SIDE * CHANNELS[0] // self.outputs
        first, second = (self.inputs, self.outputs), (self.outputs, self.outputs)
        return conv_flops(*first, side) + conv_flops(*second, side)


class ConvHead(ExitHead):
    """Pools a map to 8x8, a 3x3 convolution to 64 channels, the mean, a linear map.

    Early maps have few channels and see little of the image; a linear map of their mean alone
    would be a poor classifier (MSDNet's heads have convolutions for the same reason).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, _HEAD_CHANNELS)
        self.bn = nn.BatchNorm2d(_HEAD_CHANNELS)
        self.linear = nn.Linear(_HEAD_CHANNELS, classes)
        self.flops = conv_flops(channels, _HEAD_CHANNELS, _HEAD_SIDE)
        self.flops += 2.0 * _HEAD_CHANNELS * classes

    def forward(self, feature: Tensor) -> Tensor:
        """Logits of [rows, channels, side, side]."""
        x = F.avg_pool2d(feature, feature.shape[-1] // _HEAD_SIDE)
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        logits: Tensor = self.linear(x)
        return logits.float()


class MeanHead(ExitHead):
    """A linear map of the map's mean: the network's own head."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)
        self.flops = 2.0 * channels * classes

    def forward(self, feature: Tensor) -> Tensor:
        """Logits of [rows, channels, side, side]."""
        logits: Tensor = self.linear(feature.mean((2, 3)))
        return logits.float()


class ResNet(Encoder):
    """A residual network with a head after some of its blocks.

    Args:
        blocks: n of each group.
        exits: numbers of blocks, from 1, that a head follows; ascending, the last one is 3 n.

    Raises:
        ModelError: for exits that are not so.
    """

    def __init__(self, blocks: int, exits: tuple[int, ...]) -> None:
        super().__init__()
        total = len(CHANNELS) * blocks
        steps = list(pairwise((0, *exits)))
        if blocks < 1 or not exits or exits[-1] != total or any(a >= b for a, b in steps):
            raise ModelError(
                f"exits must ascend from at least 1 to the last block, {total}, got {exits}."
            )
        self.blocks_per_group, self.exits = blocks, tuple(exits)
        self.num_stages = len(exits)
        self.conv = conv3x3(3, CHANNELS[0])
        self.bn = nn.BatchNorm2d(CHANNELS[0])
        widths = [CHANNELS[0], *(c for c in CHANNELS for _ in range(blocks))]
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))

    def begin(self, inputs: Any, sizes: Tensor) -> State:
        """Take normalized images [rows, 3, 32, 32] float; the stem is part of the first stage."""
        return State(inputs.contiguous(memory_format=torch.channels_last))

    def stage(self, index: int, state: State) -> State:
        """The blocks between head ``index`` - 1 and head ``index``."""
        x = state.hidden
        if index == 0:
            x = F.relu(self.bn(self.conv(x)))
        for block in self._blocks_of(index):
            x = block(x)
        return State(x)

    def narrow(self, state: State, rows: Tensor) -> State:
        """Keep rows."""
        return State(state.hidden[rows])

    def feature(self, index: int, state: State) -> Tensor:
        """The map itself."""
        return state.hidden

    def make_head(self, index: int, classes: int, hidden: int) -> ExitHead:
        """A head for the map; ``hidden`` is not used."""
        channels = self._blocks_of(index)[-1].outputs
        kind = MeanHead if channels == CHANNELS[-1] else ConvHead
        return kind(channels, classes)

    def stage_flops(self, index: int, sizes: NDArray[np.int64]) -> Flops:
        """The same for every image."""
        flops = sum(block.flops() for block in self._blocks_of(index))
        if index == 0:
            flops += conv_flops(3, CHANNELS[0], SIDE)
        return np.full(len(sizes), flops)

    def spec(self) -> dict[str, Any]:
        """See ``Encoder``."""
        return {"kind": "resnet", "blocks": self.blocks_per_group, "exits": list(self.exits)}

    def _blocks_of(self, index: int) -> list[Block]:
        first = self.exits[index - 1] if index else 0
        return [
            block for block in self.blocks[first : self.exits[index]] if isinstance(block, Block)
        ]


def load_resnet(file: Path, exits: tuple[int, ...]) -> tuple[ResNet, Tensor, Tensor]:
    """Read published weights (github.com/akamaster/pytorch_resnet_cifar10, ``.th`` files).

    Args:
        exits: see ``ResNet``; empty: after every second block from the first on, and the last.

    Returns:
        the network; weight [10, 64] and bias [10] of its own last head.

    Raises:
        ModelError: for a file that cannot be read or holds another network.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its zip reader and its unpickler raise
        raise ModelError(f"{file}: cannot read it as PyTorch weights: {error}.") from error
    weights: dict[str, Tensor] = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    per_group = sum(n.startswith("layer1.") and n.endswith(".conv1.weight") for n in weights)
    if not per_group:
        raise ModelError(f"{file}: holds no CIFAR-10 ResNet (no layer1.0.conv1.weight).")
    total = per_group * len(CHANNELS)
    net = ResNet(per_group, exits or tuple(sorted({*range(1, total, 2), total})))
    own = {}
    for name, tensor in weights.items():
        if name.startswith("layer"):
            group, block, rest = name.removeprefix("layer").split(".", 2)
            own[f"blocks.{(int(group) - 1) * per_group + int(block)}.{rest}"] = tensor
        elif not name.startswith("linear."):
            own[name.replace("conv1.", "conv.").replace("bn1.", "bn.")] = tensor
    try:
        missing, unexpected = net.load_state_dict(own, strict=False)
        head = weights["linear.weight"], weights["linear.bias"]
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"{file}: not a CIFAR-10 ResNet: {error}.") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ModelError(f"{file}: not a CIFAR-10 ResNet: {[*missing, *unexpected][:3]}.")
    return net, *head
