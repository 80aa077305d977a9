"""The README's code runs as it stands there; its files, flags and keys exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import AGREEMENT, ALL, read, read_records, run, split_cells, val_only
from paper import table_rows
from runs import load
from tables import mean_cells

import main

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
PAGES = (
    "README.md",
    "loss/README.md",
    "scripts/results/README.md",
    "scripts/results/tables.md",
    "tests/golden/README.md",
    "utils/README.md",
)
PAGES += (".github/CONTRIBUTING.md",)
SMALL = "--data_type synthetic --width 8 --limit_train 32 --limit_val 50 --end_epoch 1 --device cpu --precision fp32"
EXAMPLES = {"loss/entropy.py", "data/mixup.py", "loss/ensemble.py", "models/densenet.py"}  # which the pages add


def block_after(text: str, page: str = README) -> str:
    """The first code block after a piece of a page's text."""
    return re.search(r"```\w+\n(.*?)```", page[page.index(text) :], re.DOTALL).group(1)


FLAG = "\n\ndef check_flags("  # the place of a flag


def apply_example(tree: Path, block: str, package: str, *places: str) -> None:
    """Copy the program into `tree` and change it as an example says: a new file, then for the package's __init__.py an
    import, and lines, each of which goes before its place, or, if it returns, replaces it."""
    for name in ("data", "loss", "models", "utils"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("main.py", ".ruff.toml"):
        shutil.copy(ROOT / name, tree)
    file, changes = block.split(f"\n# {package}/__init__.py", 1)
    name = re.match(r"# ([\w/]+\.py)", file).group(1)
    (tree / name).write_text(file)
    for words in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *words, name], cwd=tree, check=True)
    _, imported, *lines = changes.strip("\n").split("\n")
    code = (ROOT / package / "__init__.py").read_text()
    code = re.sub(rf"^from {package}\.", rf"{imported}\n\g<0>", code, count=1, flags=re.MULTILINE)
    assert imported in code
    for line, place in zip(lines, places, strict=True):
        assert place in code
        kept = "" if line.strip().startswith("return") else place
        code = code.replace(place, f"{line}\n{kept}", 1)
    (tree / package / "__init__.py").write_text(code)


def command(tree: Path, *words: str) -> list[dict]:
    """Run main.py of the tree; the records of the run named last."""
    command = [sys.executable, "main.py", *SMALL.split(), *words]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read_records(tree / "experiments" / words[-1])


@pytest.mark.slow
def test_load_run_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main([*SMALL.split(), "--BYOT", "--run_name", "my_run"]) == 0
    names = {"images": torch.randn(2, 3, 32, 32)}
    exec(block_after("## Use a trained network"), names)
    assert names["logits"].shape == (2, 100)
    assert names["decided_by"].shape == (2,)


def test_training_loop_example_softens_labels_with_the_last_epoch_s_predictions():
    losses = []
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    names = {
        "num_samples": 2,
        "num_classes": 2,
        "num_epochs": 2,
        "torch": torch,
        "train_step": losses.append,
        "device": "cpu",
    }
    names |= {"model": lambda images: logits, "loader": [(None, torch.tensor([0, 0]), torch.tensor([0, 1]))]}
    exec(block_after("## In your own training loop"), names)
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    softened = 0.2 * labels + 0.8 * logits.softmax(dim=1)
    expected = [torch.nn.functional.cross_entropy(logits, y) for y in (labels, softened)]
    assert torch.stack(losses).tolist() == pytest.approx(torch.stack(expected).tolist())


@pytest.mark.slow
def test_mixup_example_trains_with_all_methods_and_resumes_to_the_bit(tmp_path):
    apply_example(tmp_path, block_after("MixUp touches", CONTRIBUTING), "data", FLAG, "    return None\n")
    words = [*ALL, "--end_epoch", "2", "--mixup", "1", "--saveckp_freq", "1"]
    mixed = command(tmp_path, *words, "--run_name", "mixed")
    start = tmp_path / "experiments" / "mixed" / "checkpoint_epoch0.pth"
    resumed = command(tmp_path, *words, "--resume", str(start), "--run_name", "resumed")
    assert [record["train"] for record in mixed] == [record["train"] for record in resumed]
    plain = command(tmp_path, *words, "--mixup", "0", "--run_name", "plain")
    assert mixed[0]["train"]["ce"] != plain[0]["train"]["ce"]


LOSSES = [("A new loss touches", "--BYOT --confidence_penalty 0.1", "entropy", -1)]
LOSSES += [("A loss on exits touches", "--ensemble_teacher 0.5", "ensemble_kl", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("text, words, part, sign", LOSSES)
def test_loss_examples_touch_only_loss(text, words, part, sign, tmp_path):
    apply_example(tmp_path, block_after(text, CONTRIBUTING), "loss", FLAG, "    return Objective(")
    (record,) = command(tmp_path, *words.split(), "--run_name", "own")
    assert sign * record["train"][part] > 0
    assert record["val"].keys() == {"exit 1", "exit 2", "exit 3", "final", "ensemble"}


@pytest.mark.slow
def test_network_example_touches_its_file_and_a_row(tmp_path):
    block = block_after("A network of another family touches", CONTRIBUTING)
    apply_example(tmp_path, block, "models", "}\n# The published script's names")
    command(tmp_path, *ALL, "--val_split", "0.25", "--classifier_type", "densenet", "--run_name", "own")
    early_exit = read(tmp_path / "experiments" / "own")["test"]["last"]["early_exit"]
    assert early_exit["multiply_adds"]["final"] > early_exit["backbone_multiply_adds"]


@pytest.mark.parametrize("status, is_requeued", [(0, False), (1, False), (138, True)])
def test_slurm_script_requeues_at_the_time_limit_alone(tmp_path, status, is_requeued):
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = ["bash", "-c", block_after("Under Slurm", CONTRIBUTING)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert (done.stdout == "scontrol requeue 7\n") == is_requeued
    assert not done.stderr


def keys(value) -> set[str]:
    """The keys of nested dicts and lists; states of tensors are left out."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if not isinstance(value, dict):
        return set()
    return {key for key in value if isinstance(key, str)}.union(*map(keys, value.values()))


def test_every_key_of_a_run_is_explained(tmp_path):
    page = (ROOT / "utils/README.md").read_text()
    directory = tmp_path / "run"
    assert run(directory, *ALL, "--val_split", "0.25", "--save_predictions") == 0
    assert val_only(directory, tmp_path / "val") == 0
    checkpoint = torch.load(directory / "checkpoint_last.pth", weights_only=True)
    written = {*checkpoint, *keys(checkpoint["starts"])}
    for name in ("results.json", "config.json"):
        written |= keys(read(directory, name))
    written |= keys(read_records(directory)) | keys(read(tmp_path / "val", "val.json"))
    written -= set(vars(main.parse_args([])))  # --help explains flags
    assert not {key for key in written if f"`{key}`" not in page}
    for file in directory.iterdir():
        assert f"`{file.name}" in page


@pytest.mark.parametrize("page", PAGES)
def test_files_and_flags_exist(page):
    text = re.sub(r"https://\S+", "", (ROOT / page).read_text())
    for path in re.findall(r"(?:scripts|tests|loss|utils|data|models)/[\w/]+\.(?:py|sh|png|md|jsonl?)", text):
        assert (ROOT / path).exists() or path in EXAMPLES, path
    known = {*vars(main.parse_args([])), "help", "logdir", "nproc_per_node"}
    known |= {"confidence_penalty", "mixup", "ensemble_teacher"}  # of the examples
    known |= {"requeue", "gpus", "cpus-per-task", "time", "open-mode", "signal", "signals-to-handle"}  # Slurm's
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"--([\w-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]+)", text)) <= known


def table_under(heading: str, text: str = README) -> list[list[str]]:
    """The rows of the first table under a heading of a page, without its own two lines."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [split_cells(line) for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)[2:]]


def test_table_1_is_of_its_runs_and_the_paper_s():
    file = ROOT / "scripts/results/cifar100_table1_30epochs.jsonl"
    last, best = ({group.runs[0].methods: group.runs for group in load([file], which)[0]} for which in ("last", "best"))
    assert sum(map(len, last.values())) == len(file.read_text().splitlines())  # one setting
    columns = ["top1_error", "top5_error", "nll", "ece", "aurc"]
    rows = []
    for paper_row in table_rows(1)[:8]:
        methods = tuple(paper_row["methods"])
        if runs := last.pop(methods, []):
            ((machine, _),) = {(start.device_name, start.git_commit) for run in runs for start in run.starts}
            ours = mean_cells(runs, [*columns, "seconds_per_epoch"], published=paper_row)
            of_best = mean_cells(best[methods], columns)
            cells = [f"{ours[k].mean:.2f} / {of_best[k].mean:.2f} / {ours[k].published:.2f}" for k in columns]
            name = " + ".join(methods).replace("PSKD", "PS-KD") or "none"
            rows.append([str(paper_row["row"]), name, *cells, f"{ours['seconds_per_epoch'].mean:.0f}", machine])
    assert not last
    assert table_under("Table 1 in a tenth of its epochs") == rows


def test_agreement_table_prints_the_bounds_of_its_tests():
    pages = README + (ROOT / "loss/README.md").read_text()  # the table is on one of them
    figures = {}
    for evidence, differences, tests in table_under("Agreement with the published script", pages):
        figures[evidence.partition(" (")[0]] = [float(figure) for figure in re.findall(r"[\d.]+e-\d+", differences)]
        file, *names = re.findall("`(.+?)`", tests)
        code = (ROOT / file).read_text()
        assert all(f"\ndef {name}(" in code for name in names), tests
    assert figures == AGREEMENT


def test_readme_is_short():
    assert len(README.splitlines()) <= 180
