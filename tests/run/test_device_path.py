"""main.py on GPUs, which are emulated: the same numbers as on a CPU, no waiting, no memory where none should be."""

import contextlib
import datetime
import functools
import io
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import emulated_gpu
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import before_step, content, random_images, read, read_records, run
from torch.utils._pytree import tree_leaves

import data
import main
from data import loader
from models import load_run
from models.early_exit import confidence, multiply_adds, predict_early
from utils import distributed, engine, launch
from utils.cuda_graph import GraphedStep
from utils.errors import Interrupted

pytestmark = pytest.mark.slow

ALL = "--PSKD --BYOT --DML"
PRECISIONS = ("tf32", "bf16", "fp16")  # beside fp32, which the other runs have
# Four full batches and a smaller one in each of three epochs; the learning rate drops in the last. It is low, so that
# 15 steps do not amplify rounding.
SMALL = "--data_type synthetic --classes 10 --image_size 16 --width 4 --batch_size 8 --limit_train 36 --lr 0.005"
SMALL += " --end_epoch 3 --lr_decay_schedule 2 --save_predictions"
RUNS = (
    (f"{ALL} --classifier_type resnet18 --val_split 0.1 --batch_size 7", "crop"),
    (f"{ALL} --classifier_type resnet50 --width 8", "resized_crop"),
    (f"{ALL} --classifier_type resnext50_32x4d --width 16", "crop"),
    *((f"{ALL} --precision {precision}", "crop") for precision in PRECISIONS),
    ("--PSKD --DML --DML_on_output", "crop"),
    ("--BYOT --DML --DML_as_published", "resized_crop"),
    ("--label_smoothing 0.1", "crop"),
)
# How often an epoch with five classifiers waits for the GPU. Beside these, it waits in the first steps, for which cuDNN
# chooses kernels, for a capture, and for each tensor of a checkpoint.
EPOCH_WAITS = {
    "train_one_epoch": 2,  # the copy of its order and augmentation, and its means
    "first_nonfinite": 1,
    "predict": 1,  # the copy of its order
    "evaluate": 6,
}


class Run(NamedTuple):
    """What main.py did."""

    directory: Path
    status: int
    errors: str  # what it printed as such
    num_graphs: int
    violations: str  # of the rules of capture
    allocations: list[int]  # on each GPU
    waits: dict[str, list[int]]  # of the step and of EPOCH_WAITS' functions: how often each call waited for a GPU


def count_waits(patch: pytest.MonkeyPatch, owner, name: str, waits: dict[str, list[int]]) -> None:
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        before = emulated_gpu.num_waits()
        result = function(*args, **kwargs)
        waits[name].append(emulated_gpu.num_waits() - before)
        return result

    patch.setattr(owner, name, counted)


def num_allocations() -> list[int]:
    stats = [torch.cuda.memory_stats(number) for number in range(torch.cuda.device_count())]
    return [gpu.get("allocation.all.allocated", 0) for gpu in stats]


def make_batches_small(patch: pytest.MonkeyPatch) -> None:
    """So that there are several; a classifier's last bits may depend on their size."""
    patch.setattr(loader, "EVALUATION_PIXELS", 8 * 16**2)  # a batch of eight


def command(directory: Path, words: str, augmentation: str = "crop", prepare=lambda patch: None) -> Run:
    """main.py in this process, after `prepare(patch)`, on synthetic images with this kind of augmentation."""
    waits, errors = defaultdict(list), io.StringIO()
    graphs, violations, allocations = emulated_gpu.Graph.num_made, emulated_gpu.violations(), num_allocations()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        synthetic = data.DATASETS["synthetic"]._replace(augmentation=augmentation)
        patch.setitem(data.DATASETS, "synthetic", synthetic)
        make_batches_small(patch)
        for name in EPOCH_WAITS:
            count_waits(patch, main, name, waits)
        count_waits(patch, GraphedStep if "--cuda_graph" in words else engine.TrainStep, "__call__", waits)
        prepare(patch)
        status = run(directory, *words.split(), flags=SMALL)
    return Run(
        directory,
        status,
        errors.getvalue(),
        emulated_gpu.Graph.num_made - graphs,
        emulated_gpu.violations().removeprefix(violations),
        [after - before for before, after in zip(allocations, num_allocations(), strict=True)],
        waits,
    )


@pytest.fixture(scope="module", params=RUNS, ids=lambda parameter: parameter[0])
def runs(request, gpu, tmp_path_factory) -> dict[str, Run]:
    """The same run on a CPU, on a GPU, and there with its step captured."""
    words, augmentation = request.param
    directory = tmp_path_factory.mktemp("runs")
    devices = {
        "cpu": f"--device cpu {words.replace('tf32', 'fp32')}",
        "eager": f"--device cuda {words}",
        "captured": f"--device cuda --cuda_graph {words}",
    }
    found = {name: gpu(command, directory / name, flags, augmentation) for name, flags in devices.items()}
    assert [run.status for run in found.values()] == [0, 0, 0]
    return found


def numbers(directory: Path) -> list[float]:
    """What a run measured, without times."""
    names = ("lr", "alpha_t", "train", "val")
    measured = [[record.get(name) for name in names] for record in read_records(directory)]
    leaves = tree_leaves([measured, read(directory).get("test")])
    return [leaf for leaf in leaves if isinstance(leaf, int | float)]


def test_training_on_a_gpu_equals_training_on_a_cpu(runs):
    directory = runs["cpu"].directory
    # On a processor with fp16 instructions (AVX512-FP16, AMX) they differ by up to 7e-4.
    is_fp16 = read(directory, "config.json")["precision"] == "fp16"
    bound = 2 * torch.finfo(torch.float16).eps if is_fp16 else 1e-4
    expected = pytest.approx(numbers(directory), rel=bound, abs=1e-4)
    assert numbers(runs["eager"].directory) == expected


def test_captured_training_equals_eager_training_to_the_bit(runs):
    captured, eager = runs["captured"], runs["eager"]
    assert content(captured.directory) == content(eager.directory)
    assert captured.errors == eager.errors
    assert not captured.violations
    assert captured.num_graphs == 2  # one for each learning rate


@pytest.mark.parametrize("name", ["eager", "captured"])
def test_no_step_waits_for_the_gpu(runs, name):
    second_epoch = runs[name].waits["__call__"][5:10]  # before, kernels are chosen and the step is captured
    assert second_epoch == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("runs", [RUNS[0]], indirect=True)
def test_an_epoch_waits_for_the_gpu_a_few_times(runs):
    waits = runs["eager"].waits
    assert {name: waits[name][1] for name in EPOCH_WAITS} == EPOCH_WAITS


def interrupt(number: int, patch: pytest.MonkeyPatch) -> None:
    def stop(step):
        raise Interrupted(15)

    before_step(patch, number, stop)


@pytest.mark.parametrize("runs", [RUNS[0]], indirect=True)
def test_resumed_training_equals_uninterrupted_training_to_the_bit(runs, gpu, tmp_path):
    words = f"--device cuda --cuda_graph {RUNS[0][0]}"
    # Steps outside of graphs: three to warm up, one to capture, and the last ones of two epochs.
    assert gpu(command, tmp_path / "run", words, "crop", functools.partial(interrupt, 5)).status == 143
    assert gpu(command, tmp_path / "run", words).status == 0
    assert content(tmp_path / "run") == content(runs["captured"].directory)


def evaluate_again(source: Path, directory: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        make_batches_small(patch)
        return run(directory, "--resume", str(source), "--device", "cuda", flags="--val_only")


@pytest.mark.parametrize("runs", [RUNS[0]], indirect=True)
def test_val_only_on_a_gpu_gives_the_metrics_of_the_run(runs, gpu, tmp_path):
    directory = runs["captured"].directory
    assert gpu(evaluate_again, directory, tmp_path / "val") == 0
    assert read(tmp_path / "val", "val.json")["val"] == read(directory)["last"]["val"]


def classify_early(directory: Path, device: str):
    """Logits, deciding classifiers and multiply-adds of a run's network."""
    model, info = load_run(directory)
    model.to(device, memory_format=torch.channels_last)
    images = torch.from_numpy(random_images(64, 16, 16)).permute(0, 3, 1, 2).float().to(device) / 128 - 1
    temperatures = info["temperatures"]
    first_exit, _ = predict_early(model, images, 0, temperatures)
    middle = confidence(first_exit, temperatures["exit 1"]).mean().item()
    found = [predict_early(model, images, threshold, temperatures) for threshold in (0, middle, 1.01)]
    return [[t.cpu() for t in pair] for pair in found], multiply_adds(model, info["image_size"], temperatures)


@pytest.mark.parametrize("runs", [RUNS[0]], indirect=True)
def test_early_exit_on_a_gpu_decides_as_on_a_cpu(runs, gpu):
    directory = runs["captured"].directory
    decisions, costs = gpu(classify_early, directory, "cuda")
    expected, expected_costs = classify_early(directory, "cpu")
    torch.testing.assert_close(decisions, expected)
    assert len(decisions[1][1].unique()) > 1  # some images at the first exit, some later
    assert costs == expected_costs


@pytest.mark.parametrize("number, precision", [(1, "bf16"), (2, "fp32")])
def test_another_gpu_gives_the_same_run_and_the_first_stays_empty(number, precision, gpu, tmp_path):
    words = f"{ALL} --cuda_graph --device"
    first = gpu(command, tmp_path / "first", f"{words} cuda:0 --precision {precision}")
    other = gpu(command, tmp_path / "other", f"{words} cuda:{number} --precision auto")
    assert content(tmp_path / "other") == content(tmp_path / "first")
    assert first.num_graphs == other.num_graphs == 2
    assert not other.violations
    assert [gpu for gpu, count in enumerate(other.allocations) if count] == [number]


def precision_or_refusal(words: str) -> str:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            return main.parse_args(words.split()).precision
        except SystemExit:
            return errors.getvalue().partition("error: ")[2]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--device cuda:0 --precision auto", "bf16"),
        ("--device cuda:3 --precision tf32", "tf32"),
        ("--device cuda:2 --precision auto", "fp32"),
        ("--device cuda:2 --precision bf16", "argument --precision: bf16 needs a GPU of"),
        ("--device cuda:2 --precision tf32", "argument --precision: tf32 needs a GPU of"),
        ("--device cuda:2 --precision fp16", "fp16"),
        ("--device cuda:4 --precision fp16", "argument --precision: fp16 needs a GPU of compute capability 7.0"),
        ("--device cuda:5", "argument --device: 'cuda:5' cannot be used here; this machine has cpu and 5 NVIDIA GPUs"),
    ],
)
def test_precision_is_what_the_gpu_has_and_others_are_refused(words, expected, gpu):
    assert gpu(precision_or_refusal, words).startswith(expected)


def fill(device: str) -> list[torch.Tensor]:
    """Take all of a GPU's free memory."""
    taken, size = [], 2**40
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.cuda.OutOfMemoryError:
            size //= 2
    return taken


def refusal_of_a_full_gpu(words: str) -> str:
    taken = fill("cuda:3")
    assert taken
    return precision_or_refusal(words)


def test_a_full_gpu_is_refused_as_such(gpu):
    assert "'cuda:3' cannot be used here (its memory is full)" in gpu(refusal_of_a_full_gpu, "--device cuda:3")


def fill_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    taken = []
    before_step(patch, number, lambda step: taken.extend(fill("cuda:3")))


def fill_in_evaluation(patch: pytest.MonkeyPatch) -> None:
    taken, predict = [], main.predict

    def filled(*args):
        taken.extend(fill("cuda:3"))
        return predict(*args)

    patch.setattr(main, "predict", filled)


@pytest.mark.parametrize(
    "words, prepare, message",
    [
        ("", functools.partial(fill_in_step, 0), "in training with --batch_size 8 on cuda:3: lower"),
        ("--cuda_graph", functools.partial(fill_in_step, 3), "in training with --batch_size 8 on cuda:3: lower"),
        ("", fill_in_evaluation, "in evaluation on cuda:3: free memory"),
    ],
    ids=["training", "capture", "evaluation"],
)
def test_out_of_memory_is_one_line_that_names_the_phase(words, prepare, message, gpu, tmp_path):
    run = gpu(command, tmp_path / "run", f"{ALL} --device cuda:3 {words}", "crop", prepare)
    assert run.status == 1
    assert f"error: out of memory {message}" in run.errors.splitlines()[-1]


def read_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    before_step(patch, number, lambda step: step.meter.sums.sum().item())


def test_a_failed_capture_is_one_line_and_the_run_equals_the_eager_one(gpu, tmp_path):
    words = f"{ALL} --device cuda"
    failed = gpu(command, tmp_path / "failed", f"{words} --cuda_graph", "crop", functools.partial(read_in_step, 3))
    eager = gpu(command, tmp_path / "eager", words)
    assert content(failed.directory) == content(eager.directory)
    assert failed.num_graphs == 1  # and never tried again
    *others, line = failed.errors.splitlines()
    assert others == eager.errors.splitlines()
    assert "the step could not be captured" in line
    assert "operation not permitted when stream is capturing" in line


def mix_at_times(images, labels):
    """On most batches MixUp, with a weight drawn on the processor; on the others nothing."""
    weight, y = torch.rand(()).item(), F.one_hot(labels, 10).to(images)
    if weight < 0.2:
        return images, labels
    return torch.lerp(images.flip(0), images, weight), torch.lerp(y.flip(0), y, weight)


def mix(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(main, "build_transform", lambda args, num_classes: mix_at_times)


def scale_too_much(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))


def captured_and_eager(gpu, directory: Path, words: str, prepare) -> Run:
    """The captured run, which equals the eager one to the bit."""
    captured = gpu(command, directory / "captured", f"{ALL} --device cuda --cuda_graph {words}", "crop", prepare)
    eager = gpu(command, directory / "eager", f"{ALL} --device cuda {words}", "crop", prepare)
    assert content(captured.directory) == content(eager.directory)
    assert captured.num_graphs == 2
    assert not captured.violations
    return captured


def test_transform_runs_outside_the_captured_step(gpu, tmp_path):
    captured_and_eager(gpu, tmp_path, "", mix)


def test_captured_fp16_step_skips_and_rescales_as_the_eager_one(gpu, tmp_path):
    """So large a scale overflows in captured steps, too."""
    run = captured_and_eager(gpu, tmp_path, "--precision fp16", scale_too_much)
    skipped = [record["skipped_steps"] for record in read_records(run.directory)]
    assert skipped[0] == 5
    assert 5 < sum(skipped) < 15
    assert "overflowed (fp16): 5\n" in (run.directory / "experiment.log").read_text()


def process_group_arguments() -> tuple:
    """What the second of two processes gives to init_process_group."""
    joined = mock.Mock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "WORLD", launch.World(rank=1, size=2, local_rank=1))
        patch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
        patch.setattr(dist, "init_process_group", joined)
        patch.setattr(dist, "barrier", lambda: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        with distributed.process_group("cuda"):
            pass
    arguments = joined.call_args
    return arguments.args, arguments.kwargs["device_id"], arguments.kwargs["timeout"]


def test_a_process_group_knows_its_gpu_and_waits_for_two_hours(gpu):
    assert gpu(process_group_arguments) == (("nccl",), torch.device("cuda:1"), datetime.timedelta(hours=2))
