"""The processes of a run, as torchrun's environment variables say; read and checked once. Needs no PyTorch."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from utils.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """This process's number and their count: of all processes, and of those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True in one process of each machine."""
        return self.local_rank == 0


WORLD = World()  # main.py sets it when it starts; every other program is one process


def read_world(environment: Mapping[str, str]) -> World:
    """The world of torchrun's variables, which a script may also set by itself; LOCAL_WORLD_SIZE is 1 where it is
    missing. Without RANK, WORLD_SIZE and LOCAL_RANK, or with WORLD_SIZE=1, one process.

    Raises:
        UserError: some are set and others are missing, or one is no number or out of range.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if given.keys().isdisjoint(("RANK", "WORLD_SIZE", "LOCAL_RANK")) or given.get("WORLD_SIZE") == "1":
        return World()
    given.setdefault("LOCAL_WORLD_SIZE", "1")
    wrong = [name for name in VARIABLES if name not in given or not (name == "MASTER_ADDR" or is_number(given[name]))]
    if not wrong:
        world = World(*(int(given[name]) for name in VARIABLES[:4]))
        if world.rank >= world.size:
            wrong = ["RANK", "WORLD_SIZE"]
        elif environment.get("LOCAL_WORLD_SIZE") and not world.local_rank < world.local_size <= world.size:
            wrong = ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]
        else:
            return world
    raise UserError(
        f"in the environment {', '.join(wrong)} is missing or not valid: start with torchrun, or unset RANK, WORLD_SIZE"
        " and LOCAL_RANK"
    )


def is_number(text: str) -> bool:
    """Whether int() takes it, and a machine could mean it."""
    return text.isdecimal() and len(text) < 10


def end_with_torchrun() -> None:
    """Have this process get SIGTERM when torchrun is gone, which passes on neither SIGUSR1 nor kill -9. (Linux)"""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def wait_for_rank_0() -> None:
    """For another rank with an error that rank 0 most likely reports too: torchrun ends all processes once one has
    ended, so this one waits for that. If it is still there afterwards, it is the only one with an error."""
    time.sleep(10)
