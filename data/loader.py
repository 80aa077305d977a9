"""A split that lives on the training device as one uint8 tensor, and its iteration in batches."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from data import augment
from data.readers import Split
from utils import distributed, launch
from utils.errors import UserError
from utils.machine import hashed_seed
from utils.records import DataRecord

# Pixels in an evaluation batch: 256 images of 32 x 32. For every network they need less memory than a training step of
# 128 images, what the allocator keeps for later included, so that a GPU that trains can evaluate.
EVALUATION_PIXELS = 256 * 32 * 32


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for each (seed, purpose)."""
    return torch.Generator().manual_seed(hashed_seed(f"{seed} {purpose}"))


class Loader:
    """Iterating yields (images (N, 3, S, S) float32, normalised, channels_last; labels (N,) int64; index (N,) int64,
    the row in the split), all on the device; the last, smaller batch is kept.

    With `augmentation` (a key of `augment.KINDS`) it is a training loader: order and augmentation of each epoch are
    functions of (seed, epoch) alone, and each process gets its shard of every batch. Without, it is an evaluation
    loader: file order, and each process gets one contiguous shard of the split.

    `record` says which images there are, in the splits that were read with this one too.

    `len()` counts this process's batches; `num_samples` the images of the complete split.

    Raises:
        UserError: a training batch would leave a process without an image.
    """

    def __init__(
        self,
        split: Split,
        record: DataRecord,
        image_size: int,
        device: torch.device,
        augmentation: str | None = None,
        batch_size: int = 128,
        seed: int = 0,
    ):
        images = torch.from_numpy(split.images)
        if augmentation != "resized_crop":  # that one crops from the stored size
            images = resize(images, image_size)
        self.images = images.to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.record = record
        self.num_classes = len(record.class_names)
        self.num_samples = len(images)
        self.image_size = image_size
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0
        # (x / 255 - mean) / std as one multiplication and one addition
        mean = torch.tensor(record.mean, device=device)
        std = torch.tensor(record.std, device=device)
        self.scale = 1 / (255 * std)
        self.shift = -mean / std
        if augmentation is None:
            self.batch_size = max(1, EVALUATION_PIXELS // image_size**2)
        else:
            self.batch_size = batch_size
            last = self.num_samples % batch_size or batch_size
            if last < launch.WORLD.size:
                raise UserError(
                    f"the last training batch holds {last} of {self.num_samples} images, fewer than the"
                    f" {launch.WORLD.size} processes: change --batch_size ({batch_size}) or --limit_train"
                )

    def set_epoch(self, epoch: int) -> None:
        """Order and augmentation of the next iterations: a function of (seed, epoch) and nothing else."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan())

    def _plan(self) -> list[torch.Tensor]:
        """This process's shard of each batch, (N, 1 + C) int64: rows, and the random numbers of augmentation."""
        if self.augmentation is None:
            rows = torch.arange(self.num_samples)[distributed.shard(self.num_samples)]  # none: one empty batch
            return list(rows[:, None].split(self.batch_size))
        draw, _ = augment.KINDS[self.augmentation]
        random = generator(self.seed, f"epoch {self.epoch}")
        order = torch.randperm(self.num_samples, generator=random)
        height, width = self.images.shape[1:3]
        draws = draw(self.num_samples, height, width, random)
        rows = torch.cat([order[:, None], draws], dim=1)
        return [batch[distributed.shard(len(batch))] for batch in rows.split(self.batch_size)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        batches = self._plan()
        plan = torch.cat(batches).to(self.images.device)  # the one copy of the epoch
        for rows in plan.split([len(batch) for batch in batches]):
            index = rows[:, 0].contiguous()
            images = self.images[index]
            if self.augmentation is not None:
                _, apply = augment.KINDS[self.augmentation]
                images = apply(images, rows[:, 1:], self.image_size)
            # NHWC in memory, seen as NCHW: that is channels_last
            images = images.contiguous() * self.scale + self.shift
            yield images.permute(0, 3, 1, 2), self.labels[index], index


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """images (M, R, R, 3) uint8 on the CPU -> (M, S, S, 3) uint8, antialiased bilinear."""
    if images.shape[1] == size:
        return images
    images = images.permute(0, 3, 1, 2)
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1).contiguous()
