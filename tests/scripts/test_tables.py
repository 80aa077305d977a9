"""scripts/tables.py and what else summarize.py writes: columns, formats, exported files, odd names."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import summarize
import tables
from helpers import NO_METHOD, ONLY_BYOT, cells, make_finished_run, metrics


def test_columns_can_be_chosen(tmp_path, summary):
    after = {"ece": 1.25, "nll": 0.5, "adaptive_ece": 1.5, "brier": 0.2, "augrc_pnorm": 31.0, "pnorm_p": 4}
    test = {"epoch": 299, "temperatures": {}, "metrics": {"exit 1": metrics(40.0), "final": metrics(20.0)}}
    test["calibrated"] = {"final": after, "exit 1": after}
    make_finished_run(tmp_path, "a", 90.0, val_split=0.1, results={"test": {"last": test}})
    names = ("augrc", "brier", "brier_after_T", "nll_after_T", "adaptive_ece_after_T", "augrc_pnorm", "pnorm_p")
    (row,) = cells(summary("--table", "1", "--metrics", *names, "exit 1", "auroc_failure"))
    assert list(row)[5:] == [
        "AUGRC (x 1000)", "Brier", "Brier after T", "NLL after T (nats)", "ad. ECE after T (%)",
        "AUGRC of pNorm (x 1000)", "p of pNorm", "exit 1 err (%)",
    ]  # fmt: skip
    assert list(row.values())[5:] == ["30.00", "0.2500", "0.2000", "0.5000", "1.50", "31.00", "4.0", "40.00"]


def test_a_number_that_is_rounded_to_zero_has_no_minus():
    assert [tables.fixed(value, 2, "+") for value in (-0.004, -0.006, 0.004)] == ["+0.00", "-0.01", "+0.00"]


def test_csv_has_every_number_by_its_key(tmp_path, summary, capsys):
    for seed in (1, 2):
        make_finished_run(tmp_path, f"base{seed}", 20.0 + seed, seed, **NO_METHOD)
        make_finished_run(tmp_path, f"byot{seed}", 21.0, seed, **ONLY_BYOT)
    rows = list(csv.DictReader(io.StringIO(summary("--format", "csv"))))
    assert [(row["table"][:7], row["row"]) for row in rows] == [("Table 1", "1"), ("Table 1", "2"), ("Table 2", "1")]
    names = ("methods", "n", "seeds", "top1_error", "top1_error published")
    assert [rows[0][name] for name in names] == ["baseline", "2", "1 2", "21.5", "21.41"]
    assert float(rows[0]["top1_error sd"]) == pytest.approx(0.5**0.5)
    summarize.main([str(tmp_path), "--format", "csv", "--pairs", "baseline"])
    captured = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(captured.out))
    assert row["top1_error"] == "-0.5"
    assert 5 < float(row["top1_error half_width"]) < 7
    assert "interval" in captured.err


def test_latex_is_escaped(tmp_path, summary):
    for seed in (1, 2):
        make_finished_run(tmp_path, f"a{seed}", 20.0, seed, odd_flag="50 % |", **NO_METHOD)
    changes = [{"epoch": 3, "name": "lr", "before": 0.1, "after": 0.2}]
    make_finished_run(tmp_path, "b", 20.0, **NO_METHOD, changes=changes)
    out = summary("--format", "latex", "--table", "1", "--metrics", "top1_error")
    assert "row & network & methods & n & seeds & top-1 err (\\%) \\\\\n\\midrule\n" in out
    assert "1 & resnet18 & baseline, odd\\_flag 50 \\% $|$ & 2 & 1 2 & 20.00 $\\pm$ 0.00 \\\\\n" in out
    assert "baseline, changed lr 0.1 -$>$ 0.2 after epoch 3 & 1" in out
    assert out.count("\\begin{tabular}{llllll}") == 1
    assert "% runs: 3, last epoch" in out


def test_export_can_be_read_is_exact_and_has_no_paths(tmp_path, summary):
    for seed in (1, 2):
        make_finished_run(tmp_path, f"a{seed}", 20.0 + seed / 3, seed, lr=0.10000004)
    file, copy = tmp_path / "study.jsonl", tmp_path / "copy.jsonl"
    before = summary("--export", str(file))
    assert summary("--export", str(copy), path=file) == before
    assert copy.read_text() == file.read_text()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records] == ["a1", "a2"]
    config = json.loads((tmp_path / "a1" / "config.json").read_text())
    left_out = {name: config.pop(name) for name in ("data_path", "run_name", "runtime", "workers")}
    assert records[0]["config"] == config
    assert left_out["data_path"] not in file.read_text()
    assert records[0]["results"] == json.loads((tmp_path / "a1" / "results.json").read_text())


def test_export_to_the_file_that_is_read(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0)
    file = tmp_path / "study.jsonl"
    summary("--export", str(file))
    make_finished_run(tmp_path, "a2", 21.0, 2)
    summarize.main([str(file), str(tmp_path), "--export", str(file)])
    names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    assert names == ["a1", "a2"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_refused_command_exports_nothing(tmp_path):
    make_finished_run(tmp_path, "a", 20.0)
    file = tmp_path / "study.jsonl"
    assert summarize.main([str(tmp_path), "--pairs", "nothing", "--export", str(file)]) == 1
    assert not file.exists()


def test_export_does_not_remove_lines_that_cannot_be_read(tmp_path, summary, capsys):
    make_finished_run(tmp_path, "a1", 20.0)
    file = tmp_path / "study.jsonl"
    summary("--export", str(file))
    content = file.read_text() + "{torn\n"
    file.write_text(content)
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    for name in (file, link):
        assert summarize.main([str(file), "--export", str(name)]) == 1
        assert file.read_text() == content
        assert "study.jsonl:2" in capsys.readouterr().err


def test_output_that_is_ascii_and_names_that_are_not_utf_8(tmp_path):
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 21.0, 2)
    make_finished_run(tmp_path, os.fsdecode(b"caf\xe9\n\x1b[2J"), 21.0, 2)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, summarize.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert rb"20.50 \xb1 0.71 (20.03" in done.stdout
    assert rb"caf\udce9\n\x1b[2J (the same flags" in done.stdout
    assert b"\x1b" not in done.stdout
