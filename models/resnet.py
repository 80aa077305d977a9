"""The backbone: a CIFAR stem and one to four stages of torchvision's residual blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """Kaiming-normal, fan_out, for convolutions; PyTorch's defaults elsewhere, no zero-init of residuals
    (as the published script)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


class _SlicedConv1x1(nn.Conv2d):
    """A strided 1 x 1 convolution as one of stride 1 on the pixels that it reads: the same numbers.

    For fewer than 16 input channels (only `--width` below 16 has them), where oneDNN's gradient of the strided one in
    channels_last writes outside its memory from maps of 48 x 48 on (seen with 3.13; uxlfoundation/oneDNN#6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        x = x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, self.weight)


class ResNet(nn.Module):
    """ResNet / ResNeXt for small images (He et al. 2016; Xie et al. 2017): a 3 x 3 stem of stride 1, no pooling.

    Stage s has `width * 2**(s - 1) * expansion` channels and, from the second on, halves the map. The parameters
    have torchvision's names; those of `conv1` and `fc` have other shapes than its ImageNet networks' (README, "Build on
    it", loads the rest).

    Args:
        block: torchvision's BasicBlock or Bottleneck.
        depths: residual blocks in each of the B stages.
        num_classes: K.
        width: channels of the stem and of the first stage before expansion.
        groups, width_per_group: as torchvision's.
    """

    def __init__(self, block, depths, num_classes, width, groups, width_per_group):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.num_stages = len(depths)  # B
        self.stage_channels = []
        channels = width
        for s, depth in enumerate(depths):
            planes, stride = width * 2**s, 1 if s == 0 else 2
            out = planes * block.expansion
            downsample = None
            if stride != 1 or channels != out:
                conv = _SlicedConv1x1 if channels < 16 and stride > 1 else nn.Conv2d
                downsample = nn.Sequential(conv(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            blocks = [block(channels, planes, stride, downsample, groups, width_per_group)]
            blocks += [block(out, planes, groups=groups, base_width=width_per_group) for _ in range(1, depth)]
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
            self.stage_channels.append(out)
            channels = out
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self)

    @property
    def stages(self) -> list[nn.Module]:
        """The B stages; stage s gives maps (N, C_s, S / 2**(s-1), S / 2**(s-1))."""
        return [getattr(self, f"layer{s}") for s in range(1, self.num_stages + 1)]

    def stem(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> (N, width, S, S)."""
        return self.relu(self.bn1(self.conv1(images)))
