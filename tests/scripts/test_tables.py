"""scripts/tables.py and what else summarize.py writes: columns, formats, exported files, odd names."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import summarize
from helpers import NO_METHOD, ONLY_BYOT, cells, images_record, make_finished_run, metrics


def test_columns_can_be_chosen(tmp_path, summary):
    last = {"val": {**metrics(20.0), "augrc": 33.0, "brier": 0.25, "auroc_failure": None}}
    last |= {"exits": [metrics(40.0)], "ensemble": metrics(19.0)}
    after = {"ece": 1.25, "nll": 0.5, "adaptive_ece": 1.5, "brier": 0.2, "augrc_pnorm": 31.0, "pnorm_p": 4}
    last["calibrated"] = {"val": after, "exits": [after]}
    make_finished_run(tmp_path, "a", 20.0, last=last)
    names = ("augrc", "brier", "brier_after_T", "nll_after_T", "adaptive_ece_after_T", "augrc_pnorm", "pnorm_p")
    (row,) = cells(summary("--table", "1", "--metrics", *names, "exit 1", "ensemble", "auroc_failure"))
    assert list(row)[5:] == [
        "AUGRC (x 1000)", "Brier", "Brier after T", "NLL after T (nats)", "ad. ECE after T (%)",
        "AUGRC of pNorm (x 1000)", "p of pNorm", "exit 1 err (%)", "ensemble err (%)",
    ]  # fmt: skip
    assert list(row.values())[5:] == ["33.00", "0.2500", "0.2000", "0.5000", "1.50", "31.00", "4.0", "40.00", "19.00"]


def test_csv_has_every_number_by_its_key(tmp_path, summary, capsys):
    for seed in (1, 2):
        make_finished_run(tmp_path, f"base{seed}", 20.0 + seed, seed, **NO_METHOD)
        make_finished_run(tmp_path, f"byot{seed}", 21.0, seed, **ONLY_BYOT)
    rows = list(csv.DictReader(io.StringIO(summary("--format", "csv"))))
    assert list(rows[0])[:10] == [
        "table", "row", "network", "methods", "n", "seeds",
        "top1_error", "top1_error sd", "top1_error published", "top1_error difference",
    ]  # fmt: skip
    base = {key: value for key, value in rows[0].items() if key.partition(" ")[0] in ("row", "methods", "top1_error")}
    assert list(base.values()) == ["1", "baseline", "21.5", "0.707107", "21.41", "0.09"]
    assert rows[1]["row"] == "2"
    assert "ece_after_T" not in rows[1]
    summarize.main([str(tmp_path), "--format", "csv", "--pairs", "baseline"])
    captured = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(captured.out))
    assert (row["top1_error"], row["top1_error sd"], row["top1_error published"]) == ("-0.5", "0.707107", "")
    assert float(row["top1_error low"]) < -6 < 5 < float(row["top1_error high"])
    assert "interval" in captured.err


def test_latex_is_escaped(tmp_path, summary):
    for seed in (1, 2):
        make_finished_run(tmp_path, f"a{seed}", 20.0, seed, label_smoothing=0.1, **NO_METHOD)
    make_finished_run(tmp_path, "b", 20.0, **NO_METHOD)
    out = summary("--format", "latex", "--table", "1", "--metrics", "top1_error")
    assert "row & network & methods & n & seeds & top-1 err (\\%) \\\\\n\\midrule\n" in out
    assert "1 & resnet18 & baseline, label\\_smoothing 0.1 & 2 & 1 2 & 20.00 $\\pm$ 0.00 \\\\\n" in out
    assert out.count("\\begin{tabular}{llllll}") == 1
    assert "% 3 runs, last epoch" in out


def test_export_can_be_read_and_has_no_paths(tmp_path, summary):
    for seed in (1, 2):
        make_finished_run(tmp_path, f"a{seed}", 20.0 + seed, seed, data_path="/home/me")
    file = tmp_path / "study.jsonl"
    before = summary("--export", str(file))
    assert summary(path=file) == before
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records] == ["a1", "a2"]
    config = records[0]["config"]
    assert config["data"] == {"mean": [0.123457], "std": [0.25], "splits": images_record()["splits"]}
    assert "data_path" not in config
    assert config["device_name"] == "H200"


def test_export_to_the_file_that_is_read(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0)
    file = tmp_path / "study.jsonl"
    summary("--export", str(file))
    make_finished_run(tmp_path, "a2", 21.0, 2)
    summarize.main([str(file), str(tmp_path), "--export", str(file)])
    names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    assert names == ["a1", "a2"]
    assert not list(tmp_path.glob("*.tmp"))


def test_export_keeps_the_names_of_runs_in_study_files(tmp_path, summary):
    make_finished_run(tmp_path, "a", 20.0, run_name="mine")
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    summary("--export", str(first))
    summarize.main([str(first), "--export", str(second)])
    assert json.loads(second.read_text())["name"] == "mine"
    assert second.read_text() == first.read_text()


def test_a_refused_command_exports_nothing(tmp_path, summary):
    make_finished_run(tmp_path, "a", 20.0)
    file = tmp_path / "study.jsonl"
    with pytest.raises(SystemExit):
        summary("--pairs", "nothing", "--export", str(file))
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
        with pytest.raises(SystemExit):
            summarize.main([str(file), "--export", str(name)])
        assert file.read_text() == content
        assert "study.jsonl:2" in capsys.readouterr().err


def test_home_directory_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_finished_run(tmp_path / "exp", "a", 20.0)
    summarize.main(["~/exp", "--export", "~/study.jsonl"])
    assert cells(capsys.readouterr().out, row="8")
    assert (tmp_path / "study.jsonl").exists()


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
