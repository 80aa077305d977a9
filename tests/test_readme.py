"""The README's Python is run as it stands there; its commands are ones that exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import main

ROOT = Path(main.__file__).parent
README = (ROOT / "README.md").read_text()
SMALL = "--data_type synthetic --limit_train 32 --limit_val 100 --end_epoch 1 --device cpu --precision fp32"


def block_after(text: str) -> str:
    """The first code block behind a piece of the README's text."""
    return re.search(r"```\w+\n(.*?)```", README[README.index(text) :], re.S).group(1)


def test_use_a_trained_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([*SMALL.split(), "--BYOT", "--save_predictions", "--run_name", "my_run"]) == 0
    pixels = np.random.RandomState(0).randint(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    names = {}
    exec(block_after("## Use a trained network"), names)
    exec(block_after("The backbone alone, of a ResNet-18"), names)
    assert re.search(r"class \d+ with confidence 0?\.?\d", capsys.readouterr().out)


def test_build_on_it(tmp_path):
    """Apply the example to a copy of the repository and train with it."""
    for name in ("models", "loss", "utils", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "loss" / "smoothing.py").write_text(block_after("`loss/smoothing.py`:"))
    package = (ROOT / "loss" / "__init__.py").read_text()
    import_line = block_after("in `build_objective`, before `return`:")
    append = block_after(import_line)
    package = package.replace("from loss.pskd", import_line + "from loss.pskd", 1)
    package = package.replace("    return Objective(", append + "    return Objective(", 1)
    (tmp_path / "loss" / "__init__.py").write_text(package)
    flags = (ROOT / "utils" / "flags.py").read_text()
    anchor = re.search(r'    flag\(\s*"--DML_as_published".*?\)\n', flags, re.S).group(0)
    flag = block_after("`utils/flags.py`, in `build_parser`")
    (tmp_path / "utils" / "flags.py").write_text(flags.replace(anchor, anchor + flag, 1))
    shutil.copy(ROOT / "main.py", tmp_path)
    words = [*SMALL.split(), "--width", "8", "--BYOT", "--exit_smoothing", "0.1", "--run_name", "own"]
    done = subprocess.run([sys.executable, "main.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"smoothing":' in (tmp_path / "experiments" / "own" / "metrics.jsonl").read_text()


def test_files_and_flags_that_it_names_exist():
    for path in re.findall(r"(?:scripts|tests|loss|utils|data|models)/[\w/]+\.(?:py|sh|png|md)", README):
        assert (ROOT / path).exists() or path == "loss/smoothing.py", path
    for test in re.findall(r"`(test_\w+)`", README):
        assert any(f"def {test}" in file.read_text() for file in (ROOT / "tests").glob("*.py")), test
    known = vars(main.parse_args([])).keys() | {"exit_smoothing", "help", "dry", "table", "out", "logdir"}
    known |= {"steps", "rounds", "json", "growth", "compiled", "profile"}  # of scripts/benchmark.py
    for name in re.findall(r"(?<![\w-])--([A-Za-z]\w+)", README):
        assert name in known or name in {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "max_restarts"}, (
            name
        )
