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
from helpers import (
    ALL,
    PROCESSES,
    SMALL,
    before_step,
    bits,
    make_small,
    read,
    read_checkpoint,
    read_records,
    run,
    val_only,
)
from torch._dynamo.utils import counters
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import main
from data import build_loaders
from loss import build_objective
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
    options = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "run_id": "test"}
    options |= {"start_method": "forkserver", "monitor_interval": 0.1, "max_restarts": max_restarts}
    options["rdzv_configs"] = {"rank": 0, "timeout": 300}
    options["logs_specs"] = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    start = elastic_launch(LaunchConfig(1, 1, num, **options), work)
    start(*args)


def printed(logs: Path, rank: int) -> str:
    """On stdout and stderr, by the last process of this rank."""
    *_, last = sorted(logs.glob("*/attempt_*"))
    directory = last / str(rank)
    return (directory / "stdout.log").read_text() + (directory / "stderr.log").read_text()


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
    network = CompiledNetwork(model) if compile else model
    num_exits = len(model.exits)
    all_used = len(objective.trained_classifiers(num_exits)) == num_exits + 1
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


def save_view(directory: Path) -> None:
    """What this process computes, to a file."""
    view = {}
    with distributed.process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        for flags in COMBINATIONS:
            view[flags] = epoch_of_steps(flags)
        for num in (1, 5):
            view[num] = validation(num)
        torch.save(view, directory / f"{distributed.world_size()}_{distributed.rank()}.pt")


def save_compiled(directory: Path) -> None:
    """An epoch, plain and compiled, and what was compiled, to a file."""
    view = {}
    with distributed.process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        view["plain"] = epoch_of_steps(COMBINATIONS[0])
        view["compiled"] = epoch_of_steps(COMBINATIONS[0], compile=True)
        view["frames"] = dict(counters["frames"])
        view["breaks"] = dict(counters["graph_break"])
        torch.save(view, directory / f"{distributed.world_size()}_{distributed.rank()}.pt")


def load_views(directory: Path, num: int) -> list[dict]:
    """Of `num` processes."""
    return [torch.load(directory / f"{num}_{rank}.pt", weights_only=False) for rank in range(num)]


@pytest.mark.slow
def test_compiled_step_equals_the_plain_one_in_two_processes(tmp_path):
    """The network and the objective are compiled, each as a whole."""
    launch(2, tmp_path / "logs", save_compiled, tmp_path)
    for rank, view in enumerate(load_views(tmp_path, 2)):
        assert view["frames"] == {"total": 2, "ok": 2}
        assert not view["breaks"]
        torch.testing.assert_close(view["compiled"], view["plain"], rtol=1e-12, atol=1e-12)
        assert "Warning" not in printed(tmp_path / "logs", rank)


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> dict[int, list[dict]]:
    """The views of all processes, of one, of two and of three."""
    directory = tmp_path_factory.mktemp("views")
    save_view(directory)
    for num in (2, 3):
        launch(num, directory / f"logs{num}", save_view, directory)
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


def test_a_run_of_two_processes_is_written_once(finished):
    assert read(finished)["status"] == "finished"
    assert read(finished, "config.json")["processes"] == 2
    assert len(read_records(finished)) == 3
    assert len(os.listdir(finished / "tensorboard")) == 1


def test_the_checkpoint_has_the_memory_of_all_processes(finished):
    memory = read_checkpoint(finished)["objective"]["soften.memory"]
    torch.testing.assert_close(memory.sum(dim=1), torch.ones(40))


def nll_of_exits(record: dict) -> list[float]:
    return [metrics["nll"] for metrics in record["exits"]]


def test_one_process_evaluates_a_run_of_two(finished, tmp_path):
    """As two did: rank 0's BatchNorm statistics were used for all images."""
    assert val_only(finished, tmp_path / "val") == 0
    expected = nll_of_exits(read(finished)["last"])
    assert nll_of_exits(read(tmp_path / "val", "val.json")) == pytest.approx(expected, rel=1e-5)


def test_two_processes_evaluate_and_rank_0_alone_prints(finished, tmp_path):
    launch(2, tmp_path / "logs", val_only, finished, tmp_path / "val")
    expected = nll_of_exits(read(finished)["last"])
    assert nll_of_exits(read(tmp_path / "val", "val.json")) == pytest.approx(expected, rel=1e-5)
    assert "written to" in printed(tmp_path / "logs", 0)
    assert printed(tmp_path / "logs", 1) == ""


def test_a_restart_continues_from_the_checkpoint_though_overwrite_was_given(finished, tmp_path):
    launch(2, tmp_path / "logs", work, tmp_path / "run", 1, "--overwrite", max_restarts=1)
    assert "1 of 3 epochs are done" in printed(tmp_path / "logs", 0)
    assert bits(read_records(tmp_path / "run")) == bits(read_records(finished))


def test_after_a_death_fewer_processes_continue_only_by_permission(tmp_path, capsys):
    directory = tmp_path / "run"
    with pytest.raises(ChildFailedError):
        launch(3, tmp_path / "logs", work, directory, 2, "--val_split", "0.25")
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


def disagree(directory: Path, word: str, *words: str) -> None:
    """main.py in this process, with one more word on the command line of rank 1."""
    if os.environ["RANK"] == "1":
        words = (*words, word)
    raise SystemExit(run(directory, "--batch_size", "12", *words))


def check_refused(tmp_path: Path, word: str, *words: str) -> None:
    """Rank 0 alone says in one line that the processes disagree, and nothing is written."""
    with pytest.raises(ChildFailedError) as error:
        launch(2, tmp_path / "logs", disagree, tmp_path / "run", word, *words)
    _, failure = error.value.get_first_failure()
    assert failure.exitcode == 2
    log = printed(tmp_path / "logs", 0)
    flag, _, _ = word.partition("=")
    assert f"error: {flag} differs between the processes" in log
    assert "Traceback" not in log
    assert "error" not in printed(tmp_path / "logs", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["--lr=1", "--seed=5", "--run_name=x", "--limit_train=9", "--batch_size=6"])
def test_processes_with_different_flags_end_in_one_line(word, tmp_path):
    check_refused(tmp_path, word)


def test_processes_of_which_one_only_evaluates_end_in_one_line(finished, tmp_path):
    check_refused(tmp_path, "--val_only", "--resume", str(finished))


VARIABLES = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_PORT=1 MASTER_ADDR=127.0.0.1"


def be_lonely(rank: int, port: int, log: Path) -> None:
    """main.py as process `rank` of two, without torchrun and without the other."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as main.py does
    os.environ |= dict(variable.split("=") for variable in VARIABLES.split())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    with log.open("w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    timer = threading.Timer
    threading.Timer = lambda seconds, action: timer(seconds / 50, action)  # the notice that it waits
    run(log.parent / "run", "--batch_size", "12")


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_lonely_process_prints_that_it_waits_and_ends_at_a_signal(rank, number, tmp_path):
    log = tmp_path / "log"
    log.touch()
    process = PROCESSES.Process(target=be_lonely, args=(rank, free_port(), log), daemon=True)
    process.start()
    for _ in range(6000):  # five minutes: a process that never prints would be waited for without end
        if "is waiting" in log.read_text():
            break
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == -number
    assert log.read_text() == f"process {rank} of 2 is waiting for the others to start\n"


def error_of_parsing(monkeypatch, capsys, variable: str) -> str:
    """As the first of two processes, with one variable changed."""
    for text in (*VARIABLES.split(), variable):
        name, _, value = text.partition("=")
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main.parse_args(["--device", "cpu"])
    assert end.value.code == 2
    return capsys.readouterr().err


WRONG = ["WORLD_SIZE=x", "WORLD_SIZE=0", "RANK=-1", "RANK=2", "MASTER_PORT=x", "MASTER_ADDR="]
WRONG += ["TORCHELASTIC_RESTART_COUNT=x"]


@pytest.mark.parametrize("variable", WRONG)
def test_a_wrong_variable_is_named_in_one_line(variable, monkeypatch, capsys):
    error = error_of_parsing(monkeypatch, capsys, variable)
    name, _, _ = variable.partition("=")
    assert f"variable {name}" in error
    assert error.count("\n") == 1


def test_a_batch_that_cannot_be_split_evenly_is_refused(monkeypatch, capsys):
    error = error_of_parsing(monkeypatch, capsys, "WORLD_SIZE=3")
    assert "128 cannot be split evenly over 3 processes" in error
    assert error.count("\n") == 2
