"""Two and three gloo processes against one: steps, shards, memory, whole runs, deaths, and processes that disagree."""

import functools
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import ALL, PROCESSES, SMALL, before_step, bits, make_small, read, read_records, run, val_only
from torch._dynamo.utils import counters
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import main
from data import build_loaders
from loss import build_objective, trained_exits
from models import build_model
from utils import distributed
from utils.compile import CompiledNetwork
from utils.engine import TrainStep, build_optimizer, predict, train_one_epoch

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


def launch(num: int, logs: Path, work, *args, max_restarts: int = 0) -> None:
    """What torchrun does with a script, with `work(*args)`; what it prints goes to `logs`."""
    where = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "run_id": "test"}
    how = {"start_method": "forkserver", "monitor_interval": 0.1, "max_restarts": max_restarts}
    specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    config = LaunchConfig(1, 1, num, logs_specs=specs, rdzv_configs={"rank": 0, "timeout": 300}, **where, **how)
    elastic_launch(config, work)(*args)


def printed(logs: Path, rank: int) -> str:
    """On stdout and stderr, by the last process of this rank."""
    last = max(logs.glob("*/attempt_*"), key=lambda attempt: attempt.name)
    return "".join((last / str(rank) / f"{name}.log").read_text() for name in ("stdout", "stderr"))


def parse(flags: str, num_val: int = 5):
    """19 training images: a batch of 12 and one of 7."""
    words = f"{SMALL} --batch_size 12 --limit_train 19 --limit_val {num_val} --beta 0.01 --device cpu --precision fp32"
    return main.parse_args([*words.split(), *flags.split()])


def in_float64(args, split: str | None = None):
    """(model in evaluation mode, loader): each process has BatchNorm statistics of its own in training mode."""
    loader = build_loaders(args, CPU, split="val") if split else build_loaders(args, CPU)[0]
    loader.scale, loader.shift = loader.scale.double(), loader.shift.double()
    return build_model(args, 10).double().eval(), loader


def epoch_of_steps(flags: str, compile: bool = False) -> dict:
    args = parse(flags)
    model, loader = in_float64(args)
    objective = build_objective(args, 19, 10).double().train()
    objective.set_epoch(1)
    if args.PSKD:  # of the last rows nothing is remembered
        objective.targets.memory[:15] = torch.randn(15, 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    network = CompiledNetwork(model) if compile else model
    network = distributed.wrap(network, CPU, sync_bn=False, all_used=all(trained_exits(args)))
    trained = train_one_epoch(TrainStep(network, objective, build_optimizer(args, model), CPU, "fp32", compile), loader)
    return {
        "train": {name: torch.tensor(value, dtype=torch.float64) for name, value in trained["train"].items()},
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},  # of the last batch
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "memory": objective.state_dict(),
    }


def validation(num: int) -> dict:
    """Of 1 or 5 images: with one, some processes have none."""
    logits, labels = predict(*in_float64(parse(COMBINATIONS[0], num), "val"), "fp32")
    return {"predictions": {"logits": logits, "labels": labels.double()}}


def save_view(directory: Path) -> None:
    """What this process computes, to a file."""
    with distributed.process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        view = {flags: epoch_of_steps(flags) for flags in COMBINATIONS} | {num: validation(num) for num in (1, 5)}
        torch.save(view, directory / f"{distributed.world_size()}_{distributed.rank()}.pt")


def save_compiled(directory: Path) -> None:
    """An epoch, plain and compiled, and what was compiled, to a file."""
    with distributed.process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        view = {"plain": epoch_of_steps(COMBINATIONS[0]), "compiled": epoch_of_steps(COMBINATIONS[0], compile=True)}
        view |= {"frames": dict(counters["frames"]), "breaks": dict(counters["graph_break"])}
        torch.save(view, directory / f"compiled{distributed.rank()}.pt")


def test_compiled_step_equals_the_plain_one_in_two_processes(tmp_path):
    """The network and the objective are compiled, each as a whole."""
    launch(2, tmp_path / "logs", save_compiled, tmp_path)
    for rank in range(2):
        view = torch.load(tmp_path / f"compiled{rank}.pt", weights_only=False)
        assert view["frames"] == {"total": 2, "ok": 2} and not view["breaks"]
        torch.testing.assert_close(view["compiled"], view["plain"], rtol=1e-12, atol=1e-12)
        assert "Warning" not in printed(tmp_path / "logs", rank)


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> dict[int, list[dict]]:
    """The views of all processes, of one, of two and of three."""
    directory = tmp_path_factory.mktemp("views")
    save_view(directory)
    for num in (2, 3):
        launch(num, directory / f"logs{num}", save_view, directory)
    return {n: [torch.load(directory / f"{n}_{rank}.pt", weights_only=False) for rank in range(n)] for n in (1, 2, 3)}


@pytest.mark.parametrize("key", [*COMBINATIONS, 1, 5])
@pytest.mark.parametrize("num", [2, 3])
def test_losses_gradients_weights_memory_and_validation_equal_those_of_one_process(views, num, key):
    for process in views[num]:
        for group, expected in views[1][0][key].items():
            found = process[key][group]
            assert found.keys() == expected.keys()  # also: which parameters have no gradient and are not decayed
            for name, value in expected.items():
                error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-300)
                assert error <= 1e-10, (group, name)


def work(directory: Path, dying: int | None = None, *words: str) -> None:
    """main.py in this process. That of rank `dying`, if no restart, kills itself in the second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("RANK") == str(dying) and not distributed.is_restart():
            before_step(patch, 5, lambda step: os.kill(os.getpid(), signal.SIGKILL))
        flags = ("--batch_size", "12", "--end_epoch", "3", "--save_predictions")
        if status := run(directory, *ALL, *flags, *words):
            raise SystemExit(status)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "finished"
    launch(2, directory.parent / "logs", work, directory)
    return directory


def test_a_run_of_two_processes_and_its_evaluation_by_one_and_two(finished, tmp_path):
    assert len(read_records(finished)) == 3 and read(finished)["status"] == "finished"
    assert len(list((finished / "tensorboard").iterdir())) == 1 and read(finished, "config.json")["processes"] == 2
    memory = torch.load(finished / "checkpoint_last.pth", weights_only=True)["objective"]["targets.memory"]
    torch.testing.assert_close(memory.sum(dim=1), torch.ones(40))
    assert val_only(finished, tmp_path / "one") == 0
    launch(2, tmp_path / "logs", val_only, finished, tmp_path / "two")
    assert "written to" in printed(tmp_path / "logs", 0) and printed(tmp_path / "logs", 1) == ""
    ours = read(finished)["last"]["exits"]
    for name in ("one", "two"):  # equal: rank 0's BatchNorm statistics were used for all images
        theirs = read(tmp_path / name, "val.json")["exits"]
        assert [metrics["nll"] for metrics in theirs] == pytest.approx([metrics["nll"] for metrics in ours], rel=1e-5)


def test_a_restart_continues_from_the_checkpoint_though_overwrite_was_given(finished, tmp_path):
    launch(2, tmp_path / "logs", work, tmp_path / "run", 1, "--overwrite", max_restarts=1)
    assert "1 of 3 epochs are done" in printed(tmp_path / "logs", 0)
    assert bits(read_records(tmp_path / "run")) == bits(read_records(finished))


def test_after_a_death_fewer_processes_continue_only_by_permission(tmp_path, capsys):
    with pytest.raises(ChildFailedError):
        launch(3, tmp_path / "logs", work, tmp_path / "run", 2, "--val_split", "0.25")
    assert read(tmp_path / "run")["epochs"] == 1
    with pytest.raises(SystemExit):
        work(tmp_path / "run", None, "--val_split", "0.25")
    assert "processes 3 -> 1" in capsys.readouterr().err
    work(tmp_path / "run", None, "--val_split", "0.25", "--allow_change", "processes")
    assert read(tmp_path / "run")["status"] == "finished" and read(tmp_path / "run")["test"]["last"]["epoch"] == 2
    assert [start["processes"] for start in read(tmp_path / "run", "config.json")["starts"]] == [3, 1]
    change = {"epoch": 1, "name": "processes", "before": 3, "after": 1}
    assert read(tmp_path / "run", "config.json")["changes"] == [change]


def disagree(directory: Path, word: str, *words: str) -> None:
    """main.py in this process, with one more word on the command line of rank 1."""
    raise SystemExit(run(directory, "--batch_size", "12", *words, *([word] if os.environ["RANK"] == "1" else [])))


@pytest.mark.parametrize(
    "word", ["--lr=1", "--seed=5", "--run_name=x", "--limit_train=9", "--batch_size=6", "--val_only"]
)
def test_processes_with_different_flags_end_in_one_line(word, finished, tmp_path):
    words = ("--resume", str(finished)) if word == "--val_only" else ()
    with pytest.raises(ChildFailedError) as error:
        launch(2, tmp_path / "logs", disagree, tmp_path / "run", word, *words)
    log = printed(tmp_path / "logs", 0)
    assert error.value.get_first_failure()[1].exitcode == 2 and "Traceback" not in log
    assert f"error: {word.split('=')[0]} differs between the processes" in log
    assert "error" not in printed(tmp_path / "logs", 1) and not (tmp_path / "run").exists()


def be_lonely(rank: int, port: int, log: Path) -> None:
    """main.py as process `rank` of two, without torchrun and without the other."""
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ignored where the tests run in the background
        signal.signal(ending, signal.SIG_DFL)
    os.environ |= dict(variable.split("=") for variable in VARIABLES.split())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    timer = threading.Timer
    threading.Timer = lambda seconds, action: timer(seconds / 50, action)  # the notice that it waits
    run(log.parent / "run", "--batch_size", "12")


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_lonely_process_prints_that_it_waits_and_ends_at_a_signal(rank, number, tmp_path):
    process = PROCESSES.Process(target=be_lonely, args=(rank, free_port(), tmp_path / "log"), daemon=True)
    process.start()
    while not (tmp_path / "log").exists() or "is waiting" not in (tmp_path / "log").read_text():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == -number
    assert (tmp_path / "log").read_text() == f"process {rank} of 2 is waiting for the others to start\n"


VARIABLES = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_PORT=1 MASTER_ADDR=127.0.0.1"
WRONG = [
    "WORLD_SIZE=x",
    "WORLD_SIZE=0",
    "RANK=-1",
    "RANK=2",
    "MASTER_PORT=x",
    "MASTER_ADDR=",
    "TORCHELASTIC_RESTART_COUNT=x",
]


@pytest.mark.parametrize("line", [*WRONG, "WORLD_SIZE=3"])
def test_wrong_variables_and_batches_that_cannot_be_split_are_named(line, monkeypatch, capsys):
    for variable in (*VARIABLES.split(), line):
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(SystemExit) as end:
        main.parse_args(["--device", "cpu"])
    error = capsys.readouterr().err
    named = f"variable {line.split('=')[0]}" if line in WRONG else "128 cannot be split evenly over 3 processes"
    assert end.value.code == 2 and named in error and error.count("\n") == (1 if line in WRONG else 2)
