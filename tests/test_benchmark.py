"""The benchmark runs, and its table holds what it measured. How fast anything is, no test says."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import benchmark


def test_every_way_is_timed_and_shown(tmp_path, capsys):
    file = str(tmp_path / "figures.json")
    small = "--width 4 --batch_size 8 --limit_train 32 --rounds 2 --steps 1 --warm_up 1 --device cpu --precision bf16"
    benchmark.command_line(["--PSKD", "--BYOT", "--DML", *small.split(), "--json", file])
    table = capsys.readouterr().out
    found = json.loads(Path(file).read_text())
    names = ["device loader", "channels_last", "asynchronous", "bf16"]
    assert list(found["rows"]) == ["plain", *(f"plain + {name}" for name in names), "main.py"]
    for name, row in found["rows"].items():
        assert f"| {name} | {row['images_per_second']:.1f} ±" in table
        assert len(row["seconds_per_step"]) == 2 and min(row["seconds_per_step"]) > 0
        assert row["split"].keys() == {"data", "forward", "backward", "optimiser", "rest"}
    # Two multiplications and additions a weight and place, and twice that backward: of the stem alone, by hand
    assert found["flop_per_image"] > 3 * 2 * (4 * 3 * 9) * 32 * 32
    benchmark.command_line(["--from_json", file])
    assert capsys.readouterr().out == table
