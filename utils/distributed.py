"""The one module that knows about ranks: torchrun's environment in, PyTorch's collectives out.

Every function also works, at no cost, in a single process.
"""

import contextlib
import datetime
import inspect
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError, first_line

# Of a collective. The others wait in one while a process downloads or decodes a data set; a process that has died is
# noticed at once by gloo, or ended by torchrun.
TIMEOUT = datetime.timedelta(hours=2)


def check_environment() -> None:
    """Raises ValueError naming a variable of torchrun's that is missing, no number or out of range."""
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    wrong = [name for name in numbers if not (os.environ.get(name) or "0").isdecimal()]
    if not wrong and num_launched() == 0:
        wrong = ["WORLD_SIZE"]
    if not wrong and num_launched() > 1:
        wrong = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if int(os.environ["RANK"]) >= num_launched():
            wrong.append("RANK")
    if wrong:
        value = os.environ.get(wrong[0], "")
        raise ValueError(f"environment variable {wrong[0]}={value!r} is not valid; start with torchrun, or unset RANK")


def num_launched() -> int:
    """Number of processes that torchrun started, 1 without it."""
    is_launched = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return int(os.environ["WORLD_SIZE"]) if is_launched else 1


def num_local() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if num_launched() > 1 else 1


def is_main() -> bool:
    """True in rank 0, the one process that writes files and prints."""
    return num_launched() == 1 or os.environ["RANK"] == "0"


def is_local_main() -> bool:
    """True in one process of each machine."""
    return num_launched() == 1 or os.environ["LOCAL_RANK"] == "0"


def is_restart() -> bool:
    """True where torchrun (`--max_restarts`) has started these processes because earlier ones died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def launch_id() -> str | None:
    """What torchrun's processes, restarted ones included, have in common and no other launch has; None without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"  # its parent is torchrun


def local_device(name: str) -> torch.device:
    """The device that `--device` means in this process: of GPUs, under torchrun, the one of its local rank."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if num_launched() > 1 else device.index or 0)


@contextlib.contextmanager
def process_group(name: str):
    """Join the other processes, over NCCL on GPUs and gloo on CPUs; gives this process's device.

    Joining blocks outside Python: signals should end the process by themselves until it is done.

    Raises:
        UserError: another process exited.
    """
    device = local_device(name)
    if num_launched() == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL, and pickled objects on their way, use the current GPU
    text = f"process {os.environ['RANK']} of {num_launched()} is waiting for the others to start"
    notice = threading.Timer(5, lambda: print(text, file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        store, number, num_all = next(dist.rendezvous("env://"))
        if num_local() == num_all:
            # On one machine, torchrun gives restarted processes the store that still holds the dead ones' addresses.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=number, world_size=num_all, device_id=gpu)
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"the process group could not be initialised ({first_line(e)})") from None
    finally:
        notice.cancel()
    try:
        yield device
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "/gloo/transport/" in str(e):
            raise UserError(f"another process exited, see its own message or torchrun's ({first_line(e)})") from None
        raise
    # Not after an error: it waits for collectives under way, to which the others may never come. A process that
    # fails just ends, and torchrun ends the others.
    dist.destroy_process_group()


def wait_for_rank_0() -> None:
    """For another rank with an error that rank 0 most likely reports too: torchrun ends all processes once one has
    ended, so this one waits for that. If it is still there afterwards, it is the only one with an error."""
    time.sleep(10)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(num_items: int) -> slice:
    """This process's part of `num_items` items in order: contiguous, sizes differing by at most one, rank 0's never
    the smaller."""
    small, extra = divmod(num_items, world_size())
    start = rank() * small + min(rank(), extra)
    return slice(start, start + small + (rank() < extra))


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank_0(make: Callable):
    """Call `make()` in rank 0 and broadcast what it returns (anything that pickles) or the UserError that it raises."""
    value = error = None
    if is_main():
        try:
            value = make()
        except UserError as e:
            error = e
    if world_size() > 1:
        shared = [value, error]
        dist.broadcast_object_list(shared, src=0)
        value, error = shared
    if error is not None:
        raise error
    return value


def find_differing(values: dict) -> str | None:
    """The first name under which the processes have different values, None where all agree."""
    if world_size() == 1:
        return None
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, values)
    return next((name for name in values if any(other.get(name) != gathered[0][name] for other in gathered)), None)


def local_rank_0_first(make: Callable):
    """`make()` on every process, on each machine first in one of them: what that one writes, the others find."""
    if world_size() > 1 and not is_local_main():
        dist.barrier()
    value = make()
    if world_size() > 1 and is_local_main():
        dist.barrier()
    return value


def wrap(model: nn.Module, device: torch.device, sync_bn: bool, all_used: bool) -> nn.Module:
    """The network as the training step calls it.

    `all_used`: the loss reaches every parameter. Where it does not (exits that no loss trains),
    DistributedDataParallel has to search for the unused ones in every step, or it would wait for their gradients.
    """
    if world_size() == 1:
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
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
