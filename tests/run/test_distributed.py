"""Two and three gloo processes against one: steps, shards, memory, whole runs, deaths, and processes that disagree."""

import functools
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from helpers import ALL, PROCESSES, SMALL, before_step, bits, make_small, one_line, read, read_records, run, val_only
from torch._dynamo.utils import counters
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import main
from data import build_loaders
from loss import build_objective
from models import build_model
from utils import distributed, launch
from utils.compile import Compiled
from utils.engine import TrainStep, build_optimizer, predict, train_one_epoch
from utils.errors import UserError
from utils.launch import World

CPU = torch.device("cpu")
COMBINATIONS = (
    "--PSKD --BYOT --DML",
    "--PSKD --BYOT --DML --classifier_type resnet34",  # exits of the other kind
    "--BYOT --BYOT_from_k_block 2 --label_smoothing 0.1",  # no loss reaches exit 1
    "--DML",  # ... nor any exit's classifier
    "--DML --DML_as_published",  # ... nor any exit
    "--DML --DML_on_output",
    "--PSKD",
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_processes(num: int, logs: Path, work, *args, max_restarts: int = 0) -> None:
    """What torchrun does with a script, with `work(*args)`; what it prints goes to `logs`."""
    options = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "run_id": "test"}
    options |= {"start_method": "forkserver", "monitor_interval": 0.1, "max_restarts": max_restarts}
    options["rdzv_configs"] = {"rank": 0, "timeout": 300}
    options["logs_specs"] = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    start = elastic_launch(LaunchConfig(1, 1, num, **options), quietly)
    start(work, *args)


def quietly(work, *args) -> None:
    """Without PyTorch 2.4's warning of how it pickles tensors itself."""
    warnings.simplefilter("ignore", FutureWarning)
    work(*args)


def printed(logs: Path, rank: int) -> str:
    """On stdout and stderr, by the last process of this rank, less what gloo itself prints (PyTorch 2.9)."""
    *_, last = sorted(logs.glob("*/attempt_*"))
    directory = last / str(rank)
    text = (directory / "stdout.log").read_text() + (directory / "stderr.log").read_text()
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def parse(flags: str, num_val: int = 5):
    """19 training images: a batch of 12 and one of 7."""
    words = f"{SMALL} --batch_size 12 --limit_train 19 --limit_val {num_val} --beta 0.01 --device cpu --precision fp32"
    argv = f"{words} {flags}".split()
    return main.parse_args(argv)


def in_float64(args, loader):
    """The network, in evaluation mode (in training mode each process has BatchNorm statistics of its own)."""
    loader.scale = loader.scale.double()
    loader.shift = loader.shift.double()
    return build_model(args, 10).double().eval()


def fill_memory(objective) -> None:
    """Of the last 4 of 19 images nothing is remembered."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(15, 10, generator=generator)
    objective.soften.memory[:15] = logits.softmax(dim=1)


def epoch_of_steps(flags: str, compile: bool = False) -> dict:
    args = parse(flags)
    loader, _ = build_loaders(args, CPU)
    model = in_float64(args, loader)
    objective = build_objective(args, 19, 10).double().train()
    objective.set_epoch(1)
    if args.PSKD:
        fill_memory(objective)
    network = Compiled(model) if compile else model
    all_used = len(objective.trained_classifiers(3)) == 4
    network = distributed.wrap(network, CPU, sync_bn=False, all_used=all_used)
    step = TrainStep(network, objective, build_optimizer(args, model), CPU, "fp32", compile)
    train = train_one_epoch(step, loader)["train"]
    parameters = dict(model.named_parameters())
    return {
        "train": {name: torch.tensor(value, dtype=torch.float64) for name, value in train.items()},
        "gradients": {name: p.grad for name, p in parameters.items() if p.grad is not None},  # of the last batch
        "weights": {name: p.detach() for name, p in parameters.items()},
        "memory": objective.state_dict(),
    }


def validation(num: int) -> dict:
    """Of 1 or 5 images: with one, some processes have none."""
    args = parse(COMBINATIONS[0], num)
    loader = build_loaders(args, CPU, split="val")
    model = in_float64(args, loader)
    logits, labels = predict(model, loader, "fp32")
    return {"predictions": {"logits": logits, "labels": labels.double()}}


def everything() -> dict:
    return {**{flags: epoch_of_steps(flags) for flags in COMBINATIONS}, 1: validation(1), 5: validation(5)}


def compiled() -> dict:
    """An epoch, plain and compiled, and what was compiled."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    view = {"plain": epoch_of_steps(COMBINATIONS[0]), "compiled": epoch_of_steps(COMBINATIONS[0], compile=True)}
    return view | {"frames": dict(counters["frames"]), "breaks": dict(counters["graph_break"])}


def save_view(directory: Path, compute) -> None:
    """What this process computes, to a file."""
    launch.WORLD = launch.read_world(os.environ)
    with distributed.process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        torch.save(compute(), directory / f"{launch.WORLD.size}_{launch.WORLD.rank}.pt")


def load_views(directory: Path, num: int) -> list[dict]:
    """Of `num` processes."""
    return [torch.load(directory / f"{num}_{rank}.pt", weights_only=False) for rank in range(num)]


@pytest.mark.slow
def test_compiled_step_equals_the_plain_one_in_two_processes(tmp_path):
    """The network and the objective are compiled, each as a whole."""
    launch_processes(2, tmp_path / "logs", save_view, tmp_path, compiled)
    for rank, view in enumerate(load_views(tmp_path, 2)):
        assert view["frames"] == {"total": 2, "ok": 2}
        assert not view["breaks"]
        torch.testing.assert_close(view["compiled"], view["plain"], rtol=1e-12, atol=1e-12)
        assert "Warning" not in printed(tmp_path / "logs", rank)


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> dict[int, list[dict]]:
    """The views of all processes, of one, of two and of three."""
    directory = tmp_path_factory.mktemp("views")
    save_view(directory, everything)
    for num in (2, 3):
        launch_processes(num, directory / f"logs{num}", save_view, directory, everything)
    return {num: load_views(directory, num) for num in (1, 2, 3)}


@pytest.mark.parametrize("key", [*COMBINATIONS, 1, 5])
@pytest.mark.parametrize("num", [2, 3])
def test_losses_gradients_weights_memory_and_validation_equal_those_of_one_process(views, num, key):
    (single,) = views[1]
    for process in views[num]:
        for group, expected in single[key].items():
            found = process[key][group]
            assert found.keys() == expected.keys()  # also: which parameters have no gradient and are not decayed
            for name, value in expected.items():
                error = (found[name] - value).abs().max()
                assert error <= 1e-10 * value.abs().max(), (group, name)


def work(directory: Path, dying: int | None = None, *words: str) -> None:
    """main.py in this process. That of rank `dying`, if no restart, kills itself in the second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("RANK") == str(dying) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            before_step(patch, 5, lambda step: os.kill(os.getpid(), signal.SIGKILL))
        flags = ("--batch_size", "12", "--end_epoch", "3", "--save_predictions")
        if status := run(directory, *ALL, *flags, *words):
            raise SystemExit(status)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "finished"
    launch_processes(2, directory.parent / "logs", work, directory)
    return directory


def test_a_run_of_two_processes_is_written_once(finished):
    assert read(finished)["status"] == "finished"
    assert read(finished, "config.json")["processes"] == 2
    assert len(read_records(finished)) == 3
    assert len(os.listdir(finished / "tensorboard")) == 1


def nll_of_classifiers(record: dict) -> dict[str, float]:
    return {classifier: metrics["nll"] for classifier, metrics in record["val"].items()}


def test_one_process_and_two_evaluate_a_run_of_two_and_rank_0_alone_prints(finished, tmp_path):
    """Rank 0's BatchNorm statistics were used for all images."""
    assert val_only(finished, tmp_path / "one") == 0
    launch_processes(2, tmp_path / "logs", val_only, finished, tmp_path / "two")
    expected = pytest.approx(nll_of_classifiers(read(finished)["last"]), rel=1e-5)
    for name in ("one", "two"):
        assert nll_of_classifiers(read(tmp_path / name, "val.json")) == expected
    assert "written to" in printed(tmp_path / "logs", 0)
    assert printed(tmp_path / "logs", 1) == ""


def test_a_restart_continues_from_the_checkpoint(finished, tmp_path):
    launch_processes(2, tmp_path / "logs", work, tmp_path / "run", 1, max_restarts=1)
    assert "1 of 3 epochs are done" in printed(tmp_path / "logs", 0)
    assert bits(read_records(tmp_path / "run")) == bits(read_records(finished))


def finish_elsewhere(directory: Path) -> None:
    """The second process cannot see the run directory."""
    elsewhere = ("--experiments_dir", str(directory / "elsewhere")) if os.environ["RANK"] == "1" else ()
    work(directory, None, *elsewhere)


def test_a_finished_run_is_so_for_processes_that_do_not_see_it(finished, tmp_path):
    launch_processes(2, tmp_path / "logs", finish_elsewhere, finished)
    assert "is finished (3 epochs)" in printed(tmp_path / "logs", 0)


def test_overwrite_is_refused_where_each_restart_would_start_over(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(SystemExit):
        main.parse_args(["--device", "cpu", "--overwrite"])
    assert "argument --overwrite: each of torchrun's --max-restarts" in capsys.readouterr().err


def test_after_a_death_fewer_processes_continue_only_by_permission(tmp_path, capsys):
    directory = tmp_path / "run"
    with pytest.raises(ChildFailedError):
        launch_processes(3, tmp_path / "logs", work, directory, 2, "--val_split", "0.25")
    assert read(directory)["epochs"] == 1
    with pytest.raises(SystemExit):
        work(directory, None, "--val_split", "0.25")
    assert "processes 3 -> 1" in capsys.readouterr().err
    work(directory, None, "--val_split", "0.25", "--allow_change", "processes")
    results = read(directory)
    assert results["status"] == "finished"
    assert results["test"]["last"]["epoch"] == 2
    config = read(directory, "config.json")
    assert [start["processes"] for start in config["starts"]] == [3, 1]
    assert config["changes"] == [{"epoch": 1, "name": "processes", "before": 3, "after": 1}]


def disagree(directory: Path, word: str) -> None:
    """main.py in this process, with one more word on the command line of rank 1."""
    words = [word] * int(os.environ["RANK"])
    raise SystemExit(run(directory, "--batch_size", "12", *words))


@pytest.mark.parametrize("word", ["--lr=1", "--run_name=x", "--batch_size=6"])
def test_processes_with_different_flags_end_in_one_line(word, tmp_path):
    """Rank 0 alone says that they disagree, and nothing is written."""
    with pytest.raises(ChildFailedError) as error:
        launch_processes(2, tmp_path / "logs", disagree, tmp_path / "run", word)
    _, failure = error.value.get_first_failure()
    assert failure.exitcode == 2
    log = printed(tmp_path / "logs", 0)
    flag, _, _ = word.partition("=")
    assert f"error: {flag} differs between the processes" in log
    assert "Traceback" not in log
    assert "error" not in printed(tmp_path / "logs", 1)
    assert not (tmp_path / "run").exists()


def test_a_process_whose_flags_alone_are_wrong_says_so(tmp_path):
    with pytest.raises(ChildFailedError):
        launch_processes(2, tmp_path / "logs", disagree, tmp_path / "run", "--lr=x")
    assert "argument --lr: 'x' is not a valid number" in printed(tmp_path / "logs", 1)


VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def be_lonely(port: int, directory: Path) -> None:
    """main.py as the first of two processes, without torchrun and without the other."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as main.py does
    os.environ |= {**VARIABLES, "MASTER_PORT": str(port)}
    run(directory, "--batch_size", "12")


def test_a_process_that_waits_for_the_others_ends_at_a_signal(tmp_path):
    port = free_port()
    process = PROCESSES.Process(target=be_lonely, args=(port, tmp_path / "run"), daemon=True)
    process.start()
    dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # it is there, and waits
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize(
    ("change", "world"),
    [
        ({}, World(rank=0, size=2)),
        ({"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(1, 2, 1, 2)),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": ""}, World()),
        (dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"), ""), World()),  # an address alone starts nothing
    ],
)
def test_variables_of_torchrun_are_the_world(change, world):
    assert launch.read_world(VARIABLES | change) == world


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"LOCAL_RANK": ""}, "LOCAL_RANK"),  # Kubeflow's
        ({"RANK": "", "LOCAL_RANK": "", "MASTER_ADDR": ""}, "RANK, LOCAL_RANK, MASTER_ADDR"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK, WORLD_SIZE"),
        (
            {"WORLD_SIZE": "x", "MASTER_PORT": "x", "LOCAL_WORLD_SIZE": "-1"},
            "WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_PORT",
        ),
        ({"WORLD_SIZE": "0"}, "RANK, WORLD_SIZE"),
        ({"RANK": "2"}, "RANK, WORLD_SIZE"),
        ({"RANK": "1" * 5000}, "RANK"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK, LOCAL_WORLD_SIZE"),
    ],
)
def test_what_is_missing_or_wrong_of_torchrun_s_variables_is_named(change, named):
    with pytest.raises(UserError, match=f"^in the environment {named} is missing or not valid"):
        launch.read_world(VARIABLES | change)


def test_a_half_set_environment_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["--device", "cpu"]) == 2
    assert "RANK, LOCAL_RANK" in one_line(capsys)


def test_a_batch_that_cannot_be_split_evenly_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(launch, "WORLD", World(size=3))
    with pytest.raises(SystemExit):
        main.parse_args(["--device", "cpu"])
    assert "128 cannot be split evenly over 3 processes" in capsys.readouterr().err


WORKER = """
from utils import launch
launch.end_with_torchrun()
import os, time
parent = os.getppid()
print("ready", flush=True)
while os.getppid() == parent:
    pass
time.sleep(5)  # the kernel gives an orphan its new parent first, and the signal after that
print("trains on")
"""


@pytest.mark.parametrize(("variables", "printed"), [({"TORCHELASTIC_RUN_ID": "none"}, b""), ({}, b"trains on\n")])
def test_a_worker_ends_with_torchrun_and_other_runs_outlive_their_parent(variables, printed):
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WORKER!r}])"
    options = {"cwd": ROOT, "env": os.environ | variables, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **options) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == printed
