"""Two and three processes against one: the step, the shares, the memory, whole runs, and what a death leaves.

The processes are started by torchrun's own agent, on this machine, over gloo.
"""

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data.files import Split
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from utils.errors import UserError

import main
from data import synthetic
from data.loader import Loader
from loss import build_objective, trained_exits
from models import build_model
from utils import distributed
from utils.engine import Meter, predict, train_one_epoch, train_step

CPU = torch.device("cpu")
TOLERANCE = 1e-10
METHODS = "--PSKD --BYOT --DML"
COMBINATIONS = (
    METHODS,
    f"{METHODS} --classifier_type resnet34",  # exits of the other kind
    "--PSKD",
    "--BYOT --BYOT_from_k_block 2",  # no loss reaches exit 1
    "--DML",  # ... nor any exit's classifier
    "--DML --DML_as_published",  # ... nor any exit
    "--DML --DML_on_output",
    "",
)


def launch(num: int, work, *args, logs: Path, max_restarts: int = 0) -> dict:
    """What torchrun does with a script, with `work(*args)`: rank -> what it returns. Console output goes to `logs`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.utils.tensorboard", "torchvision"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        max_restarts=max_restarts,
        rdzv_backend="static",  # torchrun's default
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0, "timeout": 300},
        run_id="test",
        monitor_interval=0.1,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    return elastic_launch(config, work)(*args)


def said(logs: Path, rank: int) -> str:
    """What a process said on stdout and stderr, in its last life."""
    last = max(logs.glob("*/attempt_*"), key=lambda attempt: attempt.name)
    return "".join((last / str(rank) / f"{name}.log").read_text() for name in ("stdout", "stderr"))


def small_loader(num: int, **training) -> Loader:
    random = np.random.RandomState(0)
    split = Split(random.randint(0, 256, (num, 16, 16, 3), dtype=np.uint8), random.randint(0, 10, num))
    return Loader(split, [str(k) for k in range(10)], (0.5,) * 3, (0.25,) * 3, 16, CPU, **training)


def small_network(flags: str):
    """(args, model in evaluation mode, with the BatchNorm statistics of some images)."""
    args = main.parse_args(f"{flags} --batch_size 12 --width 4 --beta 0.01 --device cpu --precision fp32".split())
    model = build_model(args, 10).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return args, model.eval()


def epoch_of_steps(flags: str) -> dict:
    """An epoch of two steps, of 12 and of 7 images, in float64: everything that this process saw and computed."""
    args, model = small_network(flags)
    model = model.double()
    loader = small_loader(19, augmentation="crop", batch_size=args.batch_size, seed=1)
    objective = build_objective(args, 19, 10).double().train()
    objective.set_epoch(150)
    if args.PSKD:  # of the last rows nothing is remembered
        objective.targets.memory[:15] = torch.randn(15, 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    network = distributed.wrap(model, CPU, sync_bn=False, all_used=all(trained_exits(args)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = []

    def step(network, objective, optimizer, autocast, meter, images, labels, index, batch):
        meter.reset()
        train_step(network, objective, optimizer, autocast, meter, images.double(), labels, index, batch)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        means = meter.means(batch)
        steps.append({"images": images, "labels": labels, "index": index, "gradients": gradients, "means": means})

    train_one_epoch(network, objective, optimizer, loader, contextlib.nullcontext, Meter(CPU), step)
    return {
        "steps": steps,
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "memory": objective.targets.memory if args.PSKD else None,
    }


def statistics() -> list[torch.Tensor]:
    """BatchNorm's running mean of a first layer after a step on images of this process's own, and after exchange."""
    _, model = small_network("")
    network = distributed.wrap(model.train(), CPU, sync_bn=False, all_used=True)
    network(torch.full((2, 3, 16, 16), float(distributed.rank())) + torch.randn(2, 3, 16, 16))
    own = model.bn1.running_mean.clone()
    distributed.broadcast_buffers(model)
    return [own, model.bn1.running_mean]


def refused(value):
    raise UserError(f"{value} is refused")


def outcome(make) -> str:
    try:
        return repr(distributed.from_main(make))
    except UserError as e:
        return repr(e)


def view() -> dict:
    """What one process makes of everything."""
    return {
        "epochs": {flags: epoch_of_steps(flags) for flags in COMBINATIONS},
        "predictions": {
            (flags, num): predict(small_network(flags)[1], small_loader(num), contextlib.nullcontext)
            for flags in COMBINATIONS[:2]
            for num in (1, 5)
        },
        "shares": [list(range(num))[distributed.share(num)] for num in range(8)],
        "statistics": statistics(),
        "outcomes": [outcome(lambda: distributed.rank() + 7), outcome(lambda: refused("this"))],
    }


def save_view(directory: Path) -> None:
    with distributed.processes("cpu"):
        torch.save(view(), directory / f"{distributed.world_size()}_{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> dict[int, list[dict]]:
    """The views of all processes, of one, of two and of three."""
    directory = tmp_path_factory.mktemp("views")
    save_view(directory)
    for num in (2, 3):
        launch(num, save_view, directory, logs=directory / f"logs{num}")
    return {
        num: [torch.load(directory / f"{num}_{rank}.pt", weights_only=False) for rank in range(num)]
        for num in (1, 2, 3)
    }


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-300)
        assert error <= TOLERANCE, name


@pytest.mark.parametrize("flags", COMBINATIONS)
@pytest.mark.parametrize("num", [2, 3])
def test_a_shared_step_is_the_whole_step(views, num, flags):
    (single,), shared = ([v["epochs"][flags] for v in views[n]] for n in (1, num))
    for t, expected in enumerate(single["steps"]):
        assert len(expected["labels"]) == (12, 7)[t]
        for process in shared:
            step = process["steps"][t]
            assert step["means"] == pytest.approx(expected["means"], rel=TOLERANCE)
            # The same names, too: a parameter without gradient must not be decayed in one of them only.
            assert_equal(step["gradients"], expected["gradients"])
    for process in shared:
        assert_equal(process["weights"], single["weights"])


@pytest.mark.parametrize("num", [2, 3])
def test_shares_in_order_are_the_batch(views, num):
    (single,), shared = ([v["epochs"][METHODS]["steps"] for v in views[n]] for n in (1, num))
    for t, expected in enumerate(single):
        for name in ("images", "labels", "index"):
            assert torch.equal(torch.cat([steps[t][name] for steps in shared]), expected[name])
    assert sorted(torch.cat([step["index"] for step in single]).tolist()) == list(range(19))
    for items, *parts in zip(views[1][0]["shares"], *(v["shares"] for v in views[num]), strict=True):
        assert list(itertools.chain(*parts)) == items
        assert [len(part) for part in parts] == sorted((len(part) for part in parts), reverse=True)
        assert len(parts[0]) - len(parts[-1]) <= 1


@pytest.mark.parametrize("num", [2, 3])
def test_memory_is_whole_on_every_process(views, num):
    (expected,), memories = ([v["epochs"][METHODS]["memory"] for v in views[n]] for n in (1, num))
    for memory in memories:
        assert torch.equal(memory, memories[0])
        assert (memory - expected).abs().max() <= TOLERANCE
        assert (memory.sum(dim=1) - 1).abs().max() <= TOLERANCE


@pytest.mark.parametrize("num", [2, 3])
def test_shared_validation_is_the_whole_one(views, num):
    """With one image, some processes have none."""
    for key, (logits, labels) in views[1][0]["predictions"].items():
        for process in views[num]:
            shared_logits, shared_labels = process["predictions"][key]
            torch.testing.assert_close(shared_logits, logits)
            assert torch.equal(shared_labels, labels)


@pytest.mark.parametrize("num", [2, 3])
def test_statistics_are_the_main_processs_on_every_process(views, num):
    first, *others = (v["statistics"] for v in views[num])
    assert torch.equal(first[0], first[1])
    for own, exchanged in others:
        assert not torch.equal(own, exchanged)
        assert torch.equal(exchanged, first[1])


@pytest.mark.parametrize("num", [1, 2, 3])
def test_what_the_main_process_makes_all_have(views, num):
    assert [v["outcomes"] for v in views[num]] == [["7", "UserError('this is refused')"]] * num


def command(directory: Path, name: str) -> list[str]:
    words = f"{METHODS} --data_type synthetic --classes 10 --limit_train 40 --image_size 16 --width 4 --batch_size 12"
    words += " --end_epoch 3 --save_predictions --device cpu --precision fp32"
    return [*words.split(), "--experiments_dir", str(directory), "--run_name", name]


def few_images(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(synthetic, "TRAIN_PER_CLASS", 4)
    patch.setattr(synthetic, "TEST_PER_CLASS", 2)


def run(directory: Path, name: str, dying: int | None = None, *words: str) -> int:
    """main.py in this process, which ends where the script would end with an error; else how often it computed
    metrics. The process of rank `dying`, in its first life, kills itself in the second epoch's first step."""
    if distributed.is_restart() and distributed.is_main():
        time.sleep(1)  # so that the others look for this process where its predecessor was, if they can
    steps, evaluations = itertools.count(), []

    def step(*args):
        if next(steps) == 4 and os.environ.get("RANK") == str(dying) and not distributed.is_restart():
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(*args)

    def evaluate(*args, once=main.evaluate):
        evaluations.append(args)
        return once(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "train_step", step)
        patch.setattr(main, "evaluate", evaluate)
        few_images(patch)
        status = main.main([*command(directory, name), *words])
    if status:
        raise SystemExit(status)
    return len(evaluations)


def records(path: Path) -> list[dict]:
    """metrics.jsonl without what differs between two equal runs."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def results(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A directory with the same run by one, by two, and by three processes."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(directory, "1") == 3
    for num in (2, 3):
        done = launch(num, run, directory, str(num), logs=directory / f"logs{num}")
        # Metrics are computed once an epoch, in the main process.
        assert done == {rank: 3 if rank == 0 else 0 for rank in range(num)}
    return directory


@pytest.mark.parametrize("num", [2, 3])
def test_a_run_of_several_processes(finished, num, monkeypatch):
    few_images(monkeypatch)
    single, shared = finished / "1", finished / str(num)
    assert {file.name for file in shared.iterdir()} == {file.name for file in single.iterdir()}
    assert len(list((shared / "tensorboard").iterdir())) == 1
    assert len(records(shared)) == 3 and results(shared)["status"] == "finished"
    assert json.loads((shared / "config.json").read_text())["processes"] == num
    for rank in range(1, num):
        assert said(finished / f"logs{num}", rank) == ""

    predictions = np.load(shared / "predictions.npz")
    assert np.array_equal(predictions["labels"], np.load(single / "predictions.npz")["labels"])
    # One process gives the same logits, row by row, from the checkpoint's weights and BatchNorm statistics.
    checkpoint = torch.load(shared / "checkpoint_last.pth", weights_only=True)
    args = main.parse_args(command(finished, "again"))
    model = build_model(args, 10)
    model.load_state_dict(checkpoint["model"])
    _, val = main.build_loaders(args, CPU)
    logits, _ = predict(model.eval(), val, contextlib.nullcontext)
    np.testing.assert_allclose(predictions["logits"], logits[-1].numpy(), rtol=1e-4, atol=1e-5)

    memory = checkpoint["objective"]["targets.memory"]
    torch.testing.assert_close(memory.sum(dim=1), torch.ones(40))


def test_several_processes_evaluate_what_they_trained(finished, tmp_path):
    launch(2, run, tmp_path, "again", None, "--val_only", "--resume", str(finished / "2"), logs=tmp_path / "logs")
    again = json.loads((tmp_path / "again" / "val.json").read_text())
    assert again["val"] == pytest.approx(results(finished / "2")["last"]["val"], rel=1e-6)
    assert "written to" in said(tmp_path / "logs", 0) and said(tmp_path / "logs", 1) == ""


def test_a_restart_goes_on_from_the_checkpoint(finished, tmp_path):
    """Not from the start, though --overwrite was given; and to the numbers of the run that nothing disturbed."""
    done = launch(2, run, tmp_path, "run", 1, "--overwrite", logs=tmp_path / "logs", max_restarts=1)
    assert done[0] == 2 and "1 of 3 epochs are done" in said(tmp_path / "logs", 0)
    assert records(tmp_path / "run") == records(finished / "2")


def test_a_death_ends_the_run_and_fewer_processes_go_on(tmp_path):
    held_out = ("--val_split", "0.25")
    with pytest.raises(ChildFailedError):
        launch(3, run, tmp_path, "run", 2, *held_out, logs=tmp_path / "logs")
    assert results(tmp_path / "run")["epochs"] == 1
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert run(tmp_path, "run", None, *held_out) == 4  # two epochs, and the test split for the last and the best
    assert launch(2, run, tmp_path, "copy", None, *held_out, logs=tmp_path / "logs2") == {0: 4, 1: 0}
    for name in ("run", "copy"):
        assert len(records(tmp_path / name)) == 3
        assert results(tmp_path / name)["status"] == "finished" and "test" in results(tmp_path / name)


def test_an_error_of_the_main_process_ends_all_with_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ChildFailedError):
            launch(2, run, tmp_path, "run", logs=tmp_path / "logs")
    said_here = said(tmp_path / "logs", 0)
    assert said_here.startswith("error: ") and said_here.count("\n") == 1 and "in use" in said_here
    assert said(tmp_path / "logs", 1) == ""


def test_an_error_of_all_is_said_once(tmp_path):
    with pytest.raises(ChildFailedError):
        launch(2, run, tmp_path, "run", None, "--lr", "1000", "--weight_decay", "1", logs=tmp_path / "logs")
    assert "error: epoch " in said(tmp_path / "logs", 0)
    assert said(tmp_path / "logs", 1) == ""


def environment(monkeypatch, rank: int, num: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("words", "num", "message"),
    [
        ("--batch_size 128", 3, "argument --batch_size: 128 cannot be split evenly among 3 processes; give 126 or 129"),
        ("--batch_size 2", 4, "argument --batch_size: 2 cannot be split evenly among 4 processes; give 4"),
        ("--batch_size 128 --sync_bn", 2, "argument --sync_bn: needs GPUs; on a CPU BatchNorm is per process"),
    ],
)
def test_flags_are_refused_by_one_process(words, num, message, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(distributed.time, "sleep", waits.append)
    for rank in range(num):
        environment(monkeypatch, rank, num)
        with pytest.raises(SystemExit) as ended:
            main.parse_args(["--device", "cpu", *words.split()])
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err.endswith(f"error: {message}\n") if rank == 0 else err == ""
        assert len(waits) == rank  # so that torchrun does not end the first before it has spoken


def test_a_process_has_the_gpu_of_its_number(monkeypatch):
    assert distributed.local_device("cuda") == torch.device("cuda", 0)
    assert distributed.local_device("cuda:2") == torch.device("cuda", 2)
    environment(monkeypatch, 3, 4)
    assert distributed.local_device("cuda") == torch.device("cuda", 3)
    assert distributed.local_device("cpu") == CPU
