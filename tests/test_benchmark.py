"""The benchmark runs, and its table holds what it measured. How fast anything is, no test says."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark.py"


def benchmark(*words: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_way_is_timed_and_shown(tmp_path):
    file = str(tmp_path / "figures.json")
    small = "--width 4 --batch_size 8 --limit_train 32 --rounds 2 --steps 1 --warm_up 1 --device cpu --precision bf16"
    table = benchmark("--PSKD", "--BYOT", "--DML", *small.split(), "--json", file)
    found = json.loads(Path(file).read_text())
    names = ["device loader", "channels_last", "asynchronous", "bf16"]
    assert list(found["rows"]) == ["plain", *(f"plain + {name}" for name in names), "main.py"]
    for name, row in found["rows"].items():
        assert f"| {name} | {row['images_per_second']:.1f} ±" in table
        assert len(row["seconds_per_step"]) == 2 and min(row["seconds_per_step"]) > 0
        assert row["split"].keys() == {"data", "forward", "backward", "optimiser", "rest"}
    # Two multiplications and additions a weight and place, and twice that backward: of the stem alone, by hand
    assert found["flop_per_image"] > 3 * 2 * (4 * 3 * 9) * 32 * 32
    assert benchmark("--from_json", file) == table
