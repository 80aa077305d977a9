"""Auxiliary classifiers on intermediate stages, and the network of a backbone and its exits."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Outputs(NamedTuple):
    """The network's outputs for N images; exits run from shallow to deep, i = 1..B-1."""

    logits: Tensor  # (N, K), the final classifier's, P_B before its softmax
    feature: Tensor  # (N, D), F_B
    exit_logits: tuple[Tensor, ...] = ()  # B-1 of (N, K), P_i
    exit_features: tuple[Tensor, ...] = ()  # B-1 of (N, D), F_i


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as a matrix product over patches: the same function and parameters.

    On CPUs oneDNN's gradient of such a convolution's weight is slow: a training step of ResNet-50 with all methods
    takes 1.1 to 1.3 times as long with it. Maps in channels_last are copied once.
    """

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel_size[0]
        num, channels, rows, columns = x.shape
        if rows % k or columns % k:  # the convolution ignores the remainder
            return super().forward(x)
        x = x.permute(0, 2, 3, 1).reshape(num, rows // k, k, columns // k, k * channels)
        patches = x.transpose(2, 3).flatten(3)  # (N, rows / k, columns / k, k k C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (O, k k C)
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


class BottleneckExit(nn.Module):
    """Exit of BYOT (Zhang et al., ICCV 2019): squeeze to D / 4 channels, one convolution that takes the map to
    the last stage's size, expand to D. Its kernel is 8, 4, 2 for exits 1, 2, 3, however many stages there are.

    Stage i's map (N, C_i, H, H) -> logits (N, K) and feature (N, D).
    """

    def __init__(self, number: int, channels: int, feature_dim: int, num_classes: int):
        super().__init__()
        kernel, squeezed = 2 ** (4 - number), max(1, feature_dim // 4)

        def normalised(conv):
            return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)]

        self.body = nn.Sequential(
            *normalised(nn.Conv2d(channels, squeezed, 1)),
            *normalised(PatchConv2d(squeezed, squeezed, kernel, stride=kernel)),
            *normalised(nn.Conv2d(squeezed, feature_dim, 1)),
        )
        self.fc = nn.Linear(feature_dim, num_classes)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        return classify(self.fc, self.body(feature_map))


def separable_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two depthwise-separable 3 x 3 convolutions; the first halves the map, the second sets the width."""

    def half(out, stride):
        return [
            nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(*half(in_channels, 2), *half(out_channels, 1))


class AttentionExit(nn.Module):
    """Exit of SCAN (Zhang et al., NeurIPS 2019): the map, weighted by an attention computed from itself, then
    shrunk and widened to the last stage's size by B - i separable convolutions.

    Stage i's map (N, C_i, H, H), H even -> logits (N, K) and feature (N, D).
    """

    def __init__(self, number: int, channels: int, feature_dim: int, num_classes: int):
        super().__init__()
        steps = []
        c = channels
        while c < feature_dim:  # ResNet's stages double their channels, so this makes B - i steps
            wider = min(2 * c, feature_dim)
            steps.append(separable_conv(c, wider))
            c = wider
        self.body = nn.Sequential(*steps)
        self.attention = nn.Sequential(
            separable_conv(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Sigmoid(),
        )
        self.fc = nn.Linear(feature_dim, num_classes)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        return classify(self.fc, self.body(self.attention(feature_map) * feature_map))


class Backbone(NamedTuple):
    """A network without its classifier: modules by the names that they have in its state_dict."""

    stem: dict[str, nn.Module]  # one after the other, images (N, 3, S, S) -> a map
    stages: dict[str, nn.Module]  # B, each of which takes the map before it to its own, (N, C, H, W)
    channels: list[int]  # C of each stage


class MultiExitNetwork(nn.Module):
    """A backbone with exits on its first B - 1 stages, or with none, and the final classifier.

    Images (N, 3, S, S) -> Outputs, in the parameters' precision. The backbone's parameters keep their names, the final
    classifier's begin with `fc.`, the exits' with `exits.`.

    Args:
        num_classes: K.
        exit_type: the kind of exit, or None for no exits.
    """

    def __init__(self, backbone: Backbone, num_classes: int, exit_type: type[nn.Module] | None):
        super().__init__()
        for name, module in (backbone.stem | backbone.stages).items():
            self.add_module(name, module)
        self.stem_names, self.stage_names = list(backbone.stem), list(backbone.stages)
        *inner, last = backbone.channels
        self.fc = nn.Linear(last, num_classes)
        init_weights(self)  # before any exit draws a number: the backbone starts alike with and without exits
        if exit_type is None:
            inner = []
        self.exits = nn.ModuleList(exit_type(i, c, last, num_classes) for i, c in enumerate(inner, start=1))
        init_weights(self.exits)

    @property
    def stages(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.stage_names]  # by name, since a module may have been replaced

    def stem(self, images: Tensor) -> Tensor:
        x = images
        for name in self.stem_names:
            x = getattr(self, name)(x)
        return x

    def forward(self, images: Tensor) -> Outputs:
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        exits = [exit_(maps[i]) for i, exit_ in enumerate(self.exits)]  # the last has none
        logits, feature = classify(self.fc, x)
        return Outputs(logits, feature, tuple(z for z, _ in exits), tuple(f for _, f in exits))


def init_weights(module: nn.Module) -> None:
    """Kaiming-normal, fan_out, for convolutions; PyTorch's defaults elsewhere, no zero-init of residuals
    (as the published script)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def classify(fc: nn.Linear, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """A map (N, D, h, w) -> logits (N, K) and the feature (N, D), which is its average. Outside autocast, in the
    precision of `fc`, because losses, memory and metrics are computed from them."""
    kind = feature_map.device.type
    # where it is off already, no context, which PyTorch 2.4 cannot export
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
        feature = feature_map.to(fc.weight.dtype).mean(dim=(2, 3))
        return fc(feature), feature
