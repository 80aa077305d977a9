"""The one module that knows about ranks: torchrun's environment in, PyTorch's collectives out.

Every function also works, at no cost, in a plain single process.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError


def num_launched() -> int:
    """Number of processes that torchrun started, 1 without it."""
    set_by_torchrun = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return int(os.environ["WORLD_SIZE"]) if set_by_torchrun else 1


def num_local() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if num_launched() > 1 else 1


def is_restart() -> bool:
    """True where torchrun (`--max_restarts`) has started these processes because their predecessors died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def local_device(name: str) -> torch.device:
    """The device `--device` means in this process: of GPUs, under torchrun, that of its number on this machine."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if num_launched() > 1 else device.index or 0)


@contextlib.contextmanager
def processes(name: str):
    """Join the other processes, over NCCL on GPUs and gloo on CPUs; gives this process's device.

    Raises:
        UserError: another process is gone.
    """
    device = local_device(name)
    if num_launched() == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL, and pickled objects on their way, use the current GPU
    store, number, num_all = next(dist.rendezvous("env://"))
    if num_local() == num_all:
        # On one machine, torchrun gives restarted processes the store in which the dead ones' addresses stand. (On
        # several, where `--rdzv_backend=c10d` makes a new store, each counts its restarts for itself.)
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=num_all)
    try:
        yield device
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "/gloo/transport/" in str(e):
            reason = str(e).strip().split(". ")[0]
            raise UserError(f"another process is gone, see its own message or torchrun's ({reason})") from None
        raise
    # Not after an error: it waits for collectives under way, to which the others may never come. A process that
    # fails just ends, and torchrun ends the others.
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and talks to the console."""
    return num_launched() == 1 or os.environ["RANK"] == "0"


def is_first_here() -> bool:
    """True in one process of each machine."""
    return num_launched() == 1 or os.environ["LOCAL_RANK"] == "0"


def let_another_speak() -> None:
    """For a process that would only repeat what another one has to say. torchrun ends all once one has ended, so
    this one waits, and is ended; if it is still there after that, it is the only one to know."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(10)


def share(num_items: int) -> slice:
    """This process's part of `num_items` things in order: contiguous, sizes differing by one at most,
    rank 0's never the smaller."""
    small, extra = divmod(num_items, world_size())
    start = rank() * small + min(rank(), extra)
    return slice(start, start + small + (rank() < extra))


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_main(make: Callable):
    """What `make()`, called in the main process alone, returns (anything that pickles), on every process; or the
    UserError that it raises."""
    if world_size() == 1:
        return make()
    value = error = None
    if is_main():
        try:
            value = make()
        except UserError as e:
            error = e
    box = [value, error]
    dist.broadcast_object_list(box, src=0)
    value, error = box
    if error is not None:
        raise error
    return value


def wrap(model: nn.Module, device: torch.device, sync_bn: bool, all_used: bool) -> nn.Module:
    """The network as the training step calls it.

    `all_used`: the loss reaches every parameter. Where it does not (exits that no loss trains),
    DistributedDataParallel has to look for the unused ones in every step, or it would wait for their gradients.
    """
    if world_size() == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=not all_used)


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the main one's BatchNorm statistics, which validation and checkpoint use."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
