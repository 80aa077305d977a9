"""Run commands of main.py, several at a time.

usage: run_commands.py JOBS GPUS COMMAND...    the last word of a COMMAND is its run's name
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import Interrupted, run_command, signals_raise, tell


def run_all(commands: list[str], jobs: int, gpus: int) -> int:
    """Run the commands, `jobs` at a time, each on one of several GPUs.

    A signal is passed on to those that run, which are waited for, and no other starts.

    Returns:
        the exit status: 0, 1 where one failed, 128 + n after signal n.
    """
    jobs = min(jobs, len(commands))
    options = {"start_new_session": True}  # a run gets Ctrl-C once, from here
    if sys.platform == "linux":  # the runs get SIGTERM when this process dies, even by kill -9
        prctl = ctypes.CDLL(None).prctl
        options["preexec_fn"] = lambda: prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    if jobs > 1:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        options["env"] = {"OMP_NUM_THREADS": "1", **os.environ}
    waiting, failed = deque(commands), []
    processes = {}  # job -> the last one that it started
    lock = threading.Lock()  # of `waiting` and `processes`

    def work(job: int) -> None:
        while True:
            with lock:
                if not waiting:
                    return
                command = shlex.split(waiting.popleft())
                name = command[-1]
                if gpus > 1:
                    command.append(f"--device=cuda:{job % gpus}")
                process = processes[job] = subprocess.Popen(command, **options)
            for line in process.stdout or ():
                tell(f"{name}: {line.rstrip()}")
            if process.wait() != 0:
                failed.append(name)

    with signals_raise(), ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(work, range(jobs)))
        except Interrupted as e:
            with lock:
                waiting.clear()
                for process in processes.values():
                    process.send_signal(e.number)
            pool.shutdown()
            tell("interrupted: rerun the same command (without --overwrite) to resume")
            return 128 + e.number
    if failed:
        tell(f"failed: {len(failed)} of {len(commands)} runs: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> int:
    jobs, gpus, *commands = sys.argv[1:]
    return run_all(commands, int(jobs), int(gpus))


if __name__ == "__main__":
    run_command(main)
