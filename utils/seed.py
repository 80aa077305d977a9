"""Random numbers and number formats, fixed before anything is built."""

import torch


def set_up_torch(seed: int, device: torch.device, precision: str) -> None:
    """Seed PyTorch and choose how float32 products are computed.

    Nothing in a training step draws from the global generators (weights come from `build_model`'s own seeding,
    order and augmentation from the loader's), so seeding them is for code that a user adds.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
        torch.backends.cudnn.benchmark = True  # shapes repeat: one for all batches, one for the last
