"""Auxiliary classifiers on intermediate stages, and the network that carries them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.resnet import ResNet, init_weights
from utils.records import classifier_names


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

    Stage i's map (N, C_i, H, H) -> map (N, D, h, w). The network averages it to the feature (N, D), and `fc` turns that
    into logits (N, K).
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

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.body(feature_map)


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

    Stage i's map (N, C_i, H, H), H even -> map (N, D, h, w), used as a bottleneck exit's.
    """

    def __init__(self, number: int, channels: int, feature_dim: int, num_classes: int):
        super().__init__()
        steps = []
        c = channels
        while c < feature_dim:  # stages double their channels, so this makes B - i steps
            steps.append(separable_conv(c, 2 * c))
            c *= 2
        self.body = nn.Sequential(*steps)
        self.attention = nn.Sequential(
            separable_conv(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Sigmoid(),
        )
        self.fc = nn.Linear(feature_dim, num_classes)

    def forward(self, feature_map: Tensor) -> Tensor:
        return self.body(self.attention(feature_map) * feature_map)


class MultiExitResNet(ResNet):
    """A backbone with exits on its first B - 1 stages, or with none.

    Images (N, 3, S, S) -> Outputs, in the parameters' precision. Backbone parameters keep torchvision's names, the
    exits' begin with `exits.`.

    Args:
        backbone: ResNet's arguments.
        num_classes: K.
        exit_type: the kind of exit, or None for no exits.

    `temperatures`, by classifier, divide the logits before a confidence is read; an exit without one, whose classifier
    no loss trains, never decides. They are 1; `load_run`, and nothing else, sets a run's own.
    """

    def __init__(self, backbone: dict, num_classes: int, exit_type: type[nn.Module] | None):
        super().__init__(**backbone, num_classes=num_classes)
        *inner, last = self.stage_channels
        if exit_type is None:
            inner = []
        self.exits = nn.ModuleList(exit_type(i, c, last, num_classes) for i, c in enumerate(inner, start=1))
        init_weights(self.exits)
        self.temperatures = dict.fromkeys(classifier_names(len(inner) + 1), 1.0)

    def forward(self, images: Tensor) -> Outputs:
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        exits = [classify(exit_.fc, exit_(m)) for exit_, m in zip(self.exits, maps, strict=False)]  # the last has none
        logits, feature = classify(self.fc, x)
        return Outputs(logits, feature, tuple(z for z, _ in exits), tuple(f for _, f in exits))

    @torch.no_grad()
    def predict_early(self, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Classify each image at the first exit that is confident enough, computing nothing beyond it.

        Args:
            images: (N, 3, S, S), normalised; the network is in evaluation mode.
            threshold: the largest probability, after the exit's temperature, from which on an exit decides. 0 stops
                every image at the first exit that a loss trains; above 1 no exit is computed, and the logits are the
                complete network's to the bit.

        Returns:
            logits (N, K) of each image's deciding classifier; its number (N,) int64, 1..B-1 for exits, B for the
            final classifier.
        """
        exits = self._deciding_exits(self.temperatures) if threshold <= 1 else {}
        logits = images.new_zeros(len(images), self.fc.out_features, dtype=self.fc.weight.dtype)
        decided_by = torch.full((len(images),), self.num_stages, device=images.device)
        remaining = torch.arange(len(images), device=images.device)
        x = self.stem(images)
        for i, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if i in exits:
                exit_logits, _ = classify(exits[i].fc, exits[i](x))
                stop = confidence(exit_logits, self.temperatures[f"exit {i}"]) >= threshold
                logits[remaining[stop]], decided_by[remaining[stop]] = exit_logits[stop], i
                if stop.all():
                    return logits, decided_by
                if stop.any():
                    x, remaining = x[~stop], remaining[~stop]
        logits[remaining], _ = classify(self.fc, x)
        return logits, decided_by

    def _deciding_exits(self, temperatures: dict[str, float]) -> dict[int, nn.Module]:
        """The exits that have a temperature, by number."""
        return {i: exit_ for i, exit_ in enumerate(self.exits, start=1) if f"exit {i}" in temperatures}

    @torch.no_grad()
    def multiply_adds(
        self, image_size: int, temperatures: dict[str, float] | None = None
    ) -> tuple[dict[str, int], int]:
        """Multiply-adds of convolutions and linear layers per image of `image_size` pixels, counted while one runs.

        Args:
            temperatures: of the classifiers that may decide (default: the network's own).

        Returns:
            those of stopping at each deciding classifier, by name, every deciding exit on the way included, as
            predict_early runs; and those of the backbone alone.
        """
        exits = self._deciding_exits(temperatures or self.temperatures)
        totals, on_exits = {}, 0
        image = torch.zeros(1, 3, image_size, image_size, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        training = self.training
        self.eval()
        with FlopCounterMode(display=False) as counter:
            x = self.stem(image)
            for i, stage in enumerate(self.stages, start=1):
                x = stage(x)
                if i in exits:
                    before = counter.get_total_flops()
                    classify(exits[i].fc, exits[i](x))
                    on_exits += counter.get_total_flops() - before
                    totals[f"exit {i}"] = counter.get_total_flops() // 2
            classify(self.fc, x)
            totals["final"] = counter.get_total_flops() // 2
        self.train(training)
        return totals, totals["final"] - on_exits // 2


def classify(fc: nn.Linear, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    """A map (N, D, h, w) -> logits (N, K) and the feature (N, D), which is its average. Outside autocast, in the
    precision of `fc`, because losses, memory and metrics are computed from them."""
    with torch.autocast(feature_map.device.type, enabled=False):
        feature = feature_map.to(fc.weight.dtype).mean(dim=(2, 3))
        return fc(feature), feature


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """The largest probability of softmax(logits / temperature): (..., K) -> (...,)."""
    return (logits / temperature).softmax(dim=-1).amax(dim=-1)
