"""CIFAR-100 as torchvision reads and downloads it."""

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100

from data.files import Split, fetching


def read(root: Path, workers: int) -> tuple[Split, Split, list[str]]:
    """(train of 50,000, test of 10,000, class names), images (M, 32, 32, 3); downloaded where missing.

    `workers` is not used. Raises UserError where the files are missing or damaged and cannot be fetched.
    """
    try:  # without the lock: many processes may start on good files at once
        parts = _load(root, download=False)
    except (OSError, RuntimeError):
        with fetching(root, "cifar-100-python.tar.gz", "put that file there"):
            parts = _load(root, download=True)
    train, test = (Split(part.data, np.array(part.targets, dtype=np.int64)) for part in parts)
    return train, test, parts[0].classes


def _load(root: Path, download: bool) -> list[CIFAR100]:
    return [CIFAR100(root, train=train, download=download) for train in (True, False)]
