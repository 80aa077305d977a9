"""The backbone: a CIFAR stem and one to four stages of torchvision's residual blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.exits import Backbone


class _SlicedConv1x1(nn.Conv2d):
    """A strided 1 x 1 convolution as one of stride 1 on the pixels that it reads: the same numbers.

    For fewer than 16 input channels (only `--width` below 16 has them), where oneDNN's gradient of the strided one in
    channels_last writes outside its memory from maps of 48 x 48 on (seen with 3.13; uxlfoundation/oneDNN#6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        x = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, self.weight)


def resnet(
    block: str, depths: tuple[int, ...], num_stages: int, width: int, groups: int = 1, width_per_group: int = 64
) -> Backbone:
    """ResNet / ResNeXt for small images (He et al. 2016; Xie et al. 2017): a 3 x 3 stem of stride 1, no pooling.

    Stage s has `width * 2**(s - 1) * expansion` channels and, from the second on, halves the map. The parameters
    have torchvision's names; `conv1` has another shape than its ImageNet networks'.

    Args:
        block: "BasicBlock" or "Bottleneck", torchvision's.
        depths: residual blocks per stage, of which the first `num_stages` are built.
        width: channels of the stem and of the first stage before expansion.
        groups, width_per_group: as torchvision's.
    """
    # here, because importing torchvision takes as long as PyTorch, and --help does not need it
    from torchvision.models import resnet

    make_block = getattr(resnet, block)
    conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    stem = {"conv1": conv1, "bn1": nn.BatchNorm2d(width), "relu": nn.ReLU(inplace=True)}
    stages, stage_channels = {}, []
    channels = width
    for s, depth in enumerate(depths[:num_stages]):
        planes, stride = width * 2**s, 1 if s == 0 else 2
        out = planes * make_block.expansion
        downsample = None
        if stride != 1 or channels != out:
            conv = _SlicedConv1x1 if channels < 16 and stride > 1 else nn.Conv2d
            downsample = nn.Sequential(conv(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        blocks = [make_block(channels, planes, stride, downsample, groups, width_per_group)]
        blocks += [make_block(out, planes, groups=groups, base_width=width_per_group) for _ in range(1, depth)]
        stages[f"layer{s + 1}"] = nn.Sequential(*blocks)
        stage_channels.append(out)
        channels = out
    return Backbone(stem, stages, stage_channels)
