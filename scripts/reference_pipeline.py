"""The pipeline of published scripts, which benchmark.py compares with: a DataLoader with PIL transforms, float32,
NCHW, eager, PS-KD's memory on the host, and `.item()` in every step."""

import functools

import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from loss.pskd import ProgressiveTargets
from utils.engine import TrainStep


class HostTargets(ProgressiveTargets):
    """PS-KD's targets, whose memory is on the host, whatever device the loss is on."""

    def forward(self, outputs, labels, index):
        on_host = outputs._replace(logits=outputs.logits.detach().cpu())
        return super().forward(on_host, labels.cpu(), index.cpu()).to(labels.device)


class ReferenceStep(TrainStep):
    """Copies its batch to the device and waits for its loss."""

    def __call__(self, images, labels, index, batch_size):
        super().__call__(*(t.to(self.device) for t in (images, labels, index)), batch_size)
        self.meter.sums.sum().item()


def build(args, loader, model: torch.nn.Module, objective: torch.nn.Module, device: torch.device):
    """The same step and images as this pipeline computes them.

    Args:
        loader: data/loader.py's, whose images are used.

    Returns:
        the step and the loader, as train_one_epoch takes them.
    """
    if args.PSKD:
        objective.targets = HostTargets(loader.num_samples, loader.num_classes, args.alpha_T, args.end_epoch)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    crop, flip = transforms.RandomCrop(loader.image_size, loader.image_size // 8), transforms.RandomHorizontalFlip()
    to_tensor = transforms.ToTensor(), transforms.Normalize(loader.mean, loader.std)
    pictures = map(transforms.ToPILImage(), loader.pictures(torch.arange(loader.num_samples)))
    samples = list(zip(pictures, loader.labels.tolist(), range(loader.num_samples), strict=True))
    reference = DataLoader(
        samples,
        loader.batch_size,
        shuffle=True,
        collate_fn=functools.partial(augment, transforms.Compose([crop, flip, *to_tensor])),
        num_workers=args.workers if device.type == "cuda" else 0,  # on a CPU they would take it from the training
        persistent_workers=device.type == "cuda" and args.workers > 0,
    )
    reference.num_samples, reference.set_epoch = loader.num_samples, lambda epoch: None
    return ReferenceStep(model, objective, optimizer, device, "fp32"), reference


def augment(transform, samples: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[(PIL image, label, row)] -> images (N, 3, S, S), labels (N,), rows (N,)."""
    images, labels, index = zip(*samples, strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels), torch.tensor(index)
