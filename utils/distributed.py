"""What the processes of a run (utils/launch.py) do together: PyTorch's collectives.

Every function also works, at no cost, in a single process.
"""

import contextlib
import datetime
import inspect
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import launch
from utils.errors import UserError, first_line

# Of a collective. The others wait in one while a process downloads or decodes a data set; a process that has died is
# noticed at once by gloo, or ended by torchrun.
TIMEOUT = datetime.timedelta(hours=2)


def local_device(name: str) -> torch.device:
    """The device that `--device` means in this process: of GPUs, under torchrun, the one of its local rank."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    return torch.device("cuda", launch.WORLD.local_rank if launch.WORLD.size > 1 else device.index or 0)


@contextlib.contextmanager
def process_group(name: str):
    """Join the other processes, over NCCL on GPUs and gloo on CPUs; gives this process's device.

    Joining blocks outside Python: signals should end the process by themselves until it is done.

    Raises:
        UserError: another process exited.
    """
    device = local_device(name)
    if launch.WORLD.size == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL, and pickled objects on their way, use the current GPU
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        if launch.WORLD.local_size == size:
            # On one machine, torchrun gives restarted processes the store that still holds the dead ones' addresses.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size, device_id=gpu)
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"the process group could not be initialised ({first_line(e)})") from None
    try:
        yield device
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "/gloo/transport/" in str(e):
            raise UserError(f"another process exited, see its own message or torchrun's ({first_line(e)})") from None
        raise
    # Before PyTorch 2.8 destroying the group waits for gloo's threads without letting them drop their last tensors.
    time.sleep(0.2)
    # Not after an error: it waits for collectives under way, to which the others may never come. A process that
    # fails just ends, and torchrun ends the others.
    dist.destroy_process_group()


def shard(num_items: int) -> slice:
    """This process's part of `num_items` items in order: contiguous, sizes differing by at most one, rank 0's never
    the smaller."""
    rank = launch.WORLD.rank
    small, extra = divmod(num_items, launch.WORLD.size)
    start = rank * small + min(rank, extra)
    return slice(start, start + small + (rank < extra))


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if launch.WORLD.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank_0(make: Callable):
    """Call `make()` in rank 0 and broadcast what it returns (anything that pickles) or the UserError that it raises."""
    value = error = None
    if launch.WORLD.is_main:
        try:
            value = make()
        except UserError as e:
            error = e
    if launch.WORLD.size > 1:
        shared = [value, error]
        dist.broadcast_object_list(shared, src=0)
        value, error = shared
    if error is not None:
        raise error
    return value


def find_differing(values: dict) -> str | None:
    """The first name under which the processes have different values, None where all agree."""
    if launch.WORLD.size == 1:
        return None
    gathered = [None] * launch.WORLD.size
    dist.all_gather_object(gathered, values)
    return next((name for name in values if any(other.get(name) != gathered[0][name] for other in gathered)), None)


def local_rank_0_first(make: Callable):
    """`make()` on every process, on each machine first in one of them: what that one writes, the others find."""
    if launch.WORLD.size > 1 and not launch.WORLD.is_local_main:
        dist.barrier()
    value = make()
    if launch.WORLD.size > 1 and launch.WORLD.is_local_main:
        dist.barrier()
    return value


def wrap(model: nn.Module, device: torch.device, sync_bn: bool, all_used: bool) -> nn.Module:
    """The network as the training step calls it.

    `all_used`: the loss reaches every parameter. Where it does not (exits that no loss trains),
    DistributedDataParallel has to search for the unused ones in every step, or it would wait for their gradients.
    """
    if launch.WORLD.size == 1:
        return model
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [device.index] if device.type == "cuda" else None
    # BatchNorm statistics are broadcast once per epoch, by broadcast_buffers.
    known = inspect.signature(DistributedDataParallel).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its old name
    options = {"device_ids": ids, "find_unused_parameters": not all_used, broadcast: False}
    return DistributedDataParallel(model, **options)


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's BatchNorm statistics, which validation and checkpoint use."""
    if launch.WORLD.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
