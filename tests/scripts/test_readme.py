"""The README's Python runs as it stands there; its files and flags exist."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import main

README = (ROOT / "README.md").read_text()
SMALL = "--data_type synthetic --width 8 --limit_train 32 --limit_val 50 --end_epoch 1 --device cpu --precision fp32"


def block_after(text: str) -> str:
    """The first code block after a piece of the README's text."""
    return re.search(r"```\w+\n(.*?)```", README[README.index(text) :], re.S).group(1)


def test_load_run_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main([*SMALL.split(), "--BYOT", "--run_name", "my_run"]) == 0
    names = {"images": torch.randn(2, 3, 32, 32)}
    exec(block_after("## Use a trained network"), names)
    assert names["logits"].shape == (2, 100) and names["decided_by"].shape == (2,)


def test_new_loss_example_touches_only_loss(tmp_path):
    for name in ("models", "loss", "utils", "data"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "loss" / "entropy.py").write_text(block_after("`loss/entropy.py`:"))
    import_line = block_after("an import, a flag at the end")
    flag = block_after(import_line)
    append = block_after(flag)
    package = (ROOT / "loss" / "__init__.py").read_text()
    package = package.replace("from loss.objective", import_line + "from loss.objective", 1)
    package = package.replace("\n\n\ndef check_flags", "\n" + flag + "\n\ndef check_flags", 1)
    package = package.replace("    return Objective(", append + "    return Objective(", 1)
    (tmp_path / "loss" / "__init__.py").write_text(package)
    words = [*SMALL.split(), "--BYOT", "--confidence_penalty", "0.1", "--run_name", "own"]
    done = subprocess.run([sys.executable, "main.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"entropy":' in (tmp_path / "experiments" / "own" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("page", ["README.md", "loss/README.md", "scripts/results/README.md", "tests/golden/README.md"])
def test_files_and_flags_exist(page):
    text = (ROOT / page).read_text()
    assert len(README.splitlines()) <= 200
    for path in re.findall(r"(?:scripts|tests|loss|utils|data|models)/[\w/]+\.(?:py|sh|png|md|jsonl?)", text):
        assert (ROOT / path).exists() or path == "loss/entropy.py", path
    known = {*vars(main.parse_args([])), "help", "logdir", "nproc_per_node", "confidence_penalty"}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r'"--([\w-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]+)", text)) <= known
