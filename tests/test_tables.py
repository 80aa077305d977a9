"""scripts/: the table drivers on a stand-in for main.py, and summarize.py on run directories made by hand."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import run_table  # noqa: E402
import summarize  # noqa: E402

ROW8 = "cifar100_resnet18_PSKD_BYOT_DML_seed4"
MAIN = """#!{python}
# Stands in for `python main.py`: leaves what a run leaves, fails where row 3 (DML alone) would run.
import json, pathlib, signal, sys, time
flags = sys.argv[2:]
name = flags[flags.index("--run_name") + 1]
run = pathlib.Path(flags[flags.index("--experiments_dir") + 1], name)
run.mkdir(parents=True, exist_ok=True)
with open(run.parent / "calls", "a") as calls:
    calls.write(name + "\\n")
if "--image_size" in flags:  # a run that only a signal ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    print("waiting", flush=True)
    time.sleep(20)
for epoch in range(50):
    print("epoch", epoch, "x" * 50)
if "_DML_" in name and "BYOT" not in name and "PSKD" not in name:
    (run / "experiment.log").write_text("diverged")
    sys.exit(7)
line = {{"val": {{"top1_error": 12.25}}}}
(run / "results.json").write_text(json.dumps({{"status": "finished", "last": line}}))
"""


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.7, "ece": 4.0, "aurc": 50.0, "eaurc": 20.0}


def make_run(root, name, top1, seed=1, status="finished", test=None, exits=None, device="H200", **flags):
    """A run directory; row 8 of Table 1 in the paper's setting unless the flags say otherwise."""
    usual = {
        "classifier_type": "resnet18", "PSKD": True, "BYOT": True, "DML": True, "data_type": "cifar100",
        "end_epoch": 300, "lr_decay_schedule": [150, 225], "BYOT_from_k_block": 1, "num_resnet_blocks": 4,
        "precision": "bf16", "limit_train": None, "run_name": name, "workers": 4,
    }  # fmt: skip
    config = {**usual, **flags, "seed": seed, "torch": "2.8", "device_name": device}
    config["git_commit"] = "0123456" + 33 * "7" + " with changes"
    ensemble = metrics(19.0) if exits else None
    line = {"epoch": 299, "val": metrics(top1), "exits": exits or [], "ensemble": ensemble}
    best = {**line, "val": metrics(top1 - 1)}
    results = {"status": status, "epochs": 300, "seconds_per_epoch": 10.0, "last": line, "best": best}
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text(json.dumps(config))
    (root / name / "results.json").write_text(json.dumps(results | ({"test": test} if test else {})))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("SEEDS", "JOBS", "EPOCHS", "EXPERIMENTS", "PYTHON"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def driver(tmp_path):
    """driver(table, *words, **environment) -> the finished process, main.py replaced by MAIN."""
    stub = tmp_path / "python"
    stub.write_text(MAIN.format(python=sys.executable))
    stub.chmod(0o755)

    def command(table, *words, **environment):
        own = {"PYTHON": str(stub), "EXPERIMENTS": str(tmp_path / "runs")}
        return {
            "args": [sys.executable, str(SCRIPTS / "run_table.py"), str(table), *words],
            "env": {**os.environ, **own, **environment}, "text": True, "cwd": tmp_path,
        }  # fmt: skip

    run = lambda *words, **environment: subprocess.run(**command(*words, **environment), capture_output=True)  # noqa: E731
    run.command, run.runs = command, tmp_path / "runs"
    return run


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(*words) -> (stdout, stderr) of summarize.py on tmp_path."""

    def call(*words):
        assert summarize.main([str(tmp_path), *words]) == 0
        return capsys.readouterr()

    return call


def cells(output, row):
    """Heading -> cell, of every line of the first Markdown table that has this row number."""
    table = output.partition("###")[2].partition("###")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    heads, *lines = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(heads, line, strict=True)) for line in lines if line[0] == str(row)]


# run_table.py


def commands(*words, extra=(), table=1):
    return run_table.commands(run_table.select(table, list(words)), list(extra))


def test_row_8_as_a_plain_command(driver):
    shown = driver(1, "8", "--dry-run", PYTHON="", EXPERIMENTS="")
    flags = "--classifier_type resnet18 --PSKD --BYOT --DML --seed 4"
    assert shown.stdout == f"python main.py {flags} --run_name {ROW8}\n"
    assert not driver.runs.exists()


def test_wrappers_work_from_any_directory(tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    for table, rows in ((1, 24), (2, 6), (3, 3), (4, 3)):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEDS": "1 2"}
        command = [SCRIPTS / f"table{table}.sh", "--dry-run"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.count("python main.py ") == 2 * rows, done.stderr


def test_selection():
    numbers = lambda *words: [row["row"] for row in run_table.select(1, list(words))]  # noqa: E731
    assert numbers() == list(range(1, 25))
    assert numbers("8") == [8]
    assert numbers("7-9", "8", "2") == [2, 7, 8, 9]
    assert numbers("resnet50") == list(range(9, 17))


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["25"], {}, "25: Table 1 has rows 1 to 24"),
        (["8-1"], {}, "8-1: Table 1 has rows"),
        (["resnet19"], {}, "resnet19: not a row (1 to 24)"),
        (["--width"], {}, "--width: unknown; flags for main.py go after --"),
        (["--", "--seed", "3"], {}, "set SEEDS in place of --seed"),
        (["--", "--PSKD"], {}, "--PSKD is what the rows set"),
        (["--", "8"], {}, "8: flags for main.py start with --"),
        ([], {"SEEDS": "1 x"}, "SEEDS: x is not a whole number"),
        ([], {"JOBS": "0"}, "JOBS=0: not a positive"),
        ([], {"EPOCHS": "ten"}, "EPOCHS=ten: not a positive"),
    ],
)
def test_bad_usage_is_one_line(words, variables, said, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_table.main(["1", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"table1.sh: error: {said}") and err.count("\n") == 1


def test_names_tell_experiments_apart(monkeypatch):
    table1 = list(commands())
    shared = [table1[row - 1] for row in (1, 8, 9, 16, 17, 24)]
    assert list(commands(table=2)) == shared  # nothing is trained twice
    suffixes = {3: ["", "_k2", "_k3"], 4: ["", "_blocks3", "_blocks2"]}
    for table in (3, 4):
        assert list(commands(table=table)) == [ROW8.replace("_seed", f"{s}_seed") for s in suffixes[table]]
    assert list(commands("8", extra=["--workers", "2", "--device=cpu", "--compile"])) == [ROW8]
    extra = ["--data_type", "synthetic", "--limit_train=64", "--lr_decay_schedule", "1", "2", "--sync_bn"]
    monkeypatch.setenv("EPOCHS", "1")
    assert "--end_epoch 1 --lr_decay_schedule 1 --run_name" in " ".join(*commands("8").values())
    monkeypatch.setenv("EPOCHS", "30")
    ((name, command),) = commands("1", extra=extra).items()
    assert name == "synthetic_resnet18_baseline_ep30_limit_train64_lr_decay_schedule1-2_sync_bn_seed4"
    tail = f" --end_epoch 30 --lr_decay_schedule 15 23 {' '.join(extra)} --run_name {name}"
    assert " ".join(command).endswith(tail)


def test_a_failure_does_not_stop_the_rest_and_what_is_finished_is_skipped(driver):
    done = driver(1, "2-4")
    failed = "cifar100_resnet18_DML_seed4"
    log = driver.runs / failed / "experiment.log"
    assert done.returncode == 1
    assert done.stdout.endswith(f"failed: 1 of 3 runs\n  {failed}: exit status 7, log {log}\n")
    assert "finished cifar100_resnet18_PSKD_seed4: top-1 error 12.25" in done.stdout

    again = driver(1, "2-4")
    assert again.returncode == 1 and again.stdout.count("skip ") == 2
    calls = (driver.runs / "calls").read_text().replace("cifar100_resnet18_", "").replace("_seed4", "")
    assert calls.split() == ["BYOT", "DML", "PSKD", "DML"]


def test_two_jobs_print_whole_lines(driver):
    done = driver(1, "1", "4", "8", JOBS="2", SEEDS="1 2")
    assert done.returncode == 0 and done.stdout.count("\nfinished ") == 6
    epochs = [line for line in done.stdout.splitlines() if "epoch" in line]
    assert len(epochs) == 6 * 50
    assert all(line.startswith("cifar100_resnet18_") and line.endswith(" " + "x" * 50) for line in epochs)


def test_a_signal_reaches_the_runs_and_no_other_starts(driver):
    process = subprocess.Popen(**driver.command(1, "1-4", "--", "--image_size", "64"), stdout=subprocess.PIPE)
    while process.stdout.readline() != "waiting\n":
        pass
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert "interrupted: the same command goes on from here" in rest and "FAILED" not in rest
    assert len((driver.runs / "calls").read_text().split()) == 1


# summarize.py


def test_mean_deviation_difference_and_mark(tmp_path, summary):
    for seed, top1 in ((1, 20.0), (2, 21.0), (3, 22.0)):  # mean 21, deviation 1; published 20.03: within 2
        make_run(tmp_path, f"a{seed}", top1, seed)
    for seed, top1 in ((1, 22.0), (2, 22.2)):  # mean 22.1, deviation .1 sqrt 2; published 19.94: beyond 2
        make_run(tmp_path, f"b{seed}", top1, seed, BYOT=False, DML=False)
    make_run(tmp_path, "c1", 30.0, PSKD=False, BYOT=False, DML=False)  # one run has no deviation and no mark
    out = summary()[0]
    (row8,), (row4,), (row1,) = cells(out, 8), cells(out, 4), cells(out, 1)
    assert (row8["methods"], row8["n"], row8["seeds"]) == ("PSKD+BYOT+DML", "3", "1 2 3")
    assert row8["top-1 err (%)"] == "21.00 ± 1.00 (20.03, +0.97)"
    assert row8["s/epoch"] == "10.0 ± 0.0 (32.08)"  # seconds on two machines: no difference
    assert row4["top-1 err (%)"] == "22.10 ± 0.14 (19.94, +2.16*)"
    assert row1["top-1 err (%)"] == "30.00 (21.41, +8.59)"
    assert "- 6 runs: H200, bf16, torch 2.8, commit 0123456 with changes." in out
    assert cells(summary("--best")[0], 8)[0]["top-1 err (%)"].startswith("20.00 ± 1.00 ")


def test_table_2_has_the_right_names(tmp_path, summary):
    make_run(tmp_path, "a", 20.0, exits=[metrics(40.0), None, metrics(21.0)])
    out = summary("--table", "2")[0]
    (row,), (baseline,) = cells(out, 2), cells(out, 1)
    assert list(row)[-5:] == ["4/4", "3/4", "2/4", "1/4", "ensemble"]
    assert row["3/4"] == "79.00 (78.92, +0.08)"  # printed under 1/4
    assert row["2/4"] == "— (75.22)"
    assert row["1/4"] == "60.00 (67.90, -7.90)"
    assert row["ensemble"] == "81.00 (79.68, +1.32)"
    assert (baseline["n"], baseline["4/4"]) == ("not run", "—")


@pytest.mark.parametrize("flag", ["precision fp32", "width 8", "alpha 0.2", "a_flag_of_tomorrow 1"])
def test_runs_that_differ_are_never_averaged(tmp_path, summary, flag):
    name, value = flag.split()
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "b1", 30.0, seed=2, **{name: value if value == "fp32" else float(value)})
    ours, other = sorted(cells(summary()[0], 8), key=lambda row: row["top-1 err (%)"])
    assert ours["top-1 err (%)"].startswith("20.00") and other["top-1 err (%)"].startswith("30.00")
    assert other["differs in"].removesuffix(".0") == flag and ours["differs in"].split()[0] == name


def test_what_does_not_define_the_experiment_does_not_split_it(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1, PSKD=False, workers=1, alpha_T=0.8)
    make_run(tmp_path, "a2", 21.0, seed=2, PSKD=False, workers=9, alpha_T=0.5, device="L4")  # PSKD is off
    file = tmp_path / "a2" / "config.json"
    file.write_text(json.dumps({"flags": json.loads(file.read_text()), "versions": {"torch": "2.9"}}))
    (row,) = cells(summary()[0], 7)
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.50 ± 0.71 (21.18, -0.68)")
    assert row["s/epoch"] == "— (31.73)"  # seconds on two machines have no mean


def test_published_numbers_stand_only_beside_the_papers_setting(tmp_path, summary):
    make_run(tmp_path, "a", 20.0, end_epoch=30, lr_decay_schedule=[15, 23])
    out = summary()[0]
    assert cells(out, 8)[0]["top-1 err (%)"] == "20.00" and "20.03" not in out
    assert "numbers omitted, the setting being another: end_epoch 30, lr_decay_schedule 15 23." in out


def test_left_out_runs_are_named_and_not_averaged(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "again", 90.0, seed=1)
    make_run(tmp_path, "cut", 90.0, seed=2, status="interrupted")
    make_run(tmp_path, "nan", float("nan"), seed=3)
    for name, content in (("torn", '{"status": "fini'), ("list", "[]"), ("bare", '{"status": "finished"}')):
        make_run(tmp_path, name, 90.0, seed=4)
        (tmp_path / name / "results.json").write_text(content)
    make_run(tmp_path, "young", 90.0, seed=5)
    (tmp_path / "young" / "results.json").unlink()
    out = summary("--table", "1")[0]
    (row,) = cells(out, 8)
    assert (row["seeds"], row["top-1 err (%)"]) == ("1", "20.00 (20.03, -0.03)")
    for said in (
        "again (the same flags and seed as ", "cut (interrupted, 300 of 300 epochs)",
        "nan (top1_error is not finite)", "torn (not readable as JSON", "list (not readable",
        "bare (an entry is missing: 'last')", "young (no results.json)",
    ):  # fmt: skip
        assert f"{os.path.relpath(tmp_path)}/{said}" in out


@pytest.mark.parametrize("nested", [True, False])
def test_validation_split_runs_show_the_test_split(tmp_path, summary, nested):
    test = {"last": {"val": metrics(33.0)}, "best": {"val": metrics(32.0)}}
    test = test if nested else {which: line["val"] for which, line in test.items()}
    make_run(tmp_path, "a", 20.0, val_split=0.1, test=test)
    out = summary()[0]
    assert cells(out, 8)[0]["top-1 err (%)"] == "33.00" and "selected on held-out images" in out
    assert cells(summary("--best")[0], 8)[0]["top-1 err (%)"] == "32.00"


def test_three_formats_of_three_synthetic_runs(tmp_path, summary):
    setting = {"data_type": "synthetic", "end_epoch": 3, "lr_decay_schedule": [2, 3], "width": 8}
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", 50.0 + seed, seed, **setting)
        make_run(tmp_path, f"b{seed}", 40.0 + seed, seed, **setting, PSKD=False)
        make_run(tmp_path, f"c{seed}", 30.0 + seed, seed, **setting, classifier_type="resnet34", BYOT=False)
    out, err = summary("--format", "csv")
    records = list(csv.DictReader(out.splitlines()))
    row8 = next(record for record in records if record["table"] == "1" and record["row"] == "8")
    assert (row8["top1_error"], row8["top1_error sd"]) == ("51.5", "0.707107")
    assert not row8["top1_error published"] and "data_type synthetic" in err
    assert [record["network"] for record in records if record["table"] == "other"] == ["resnet34"]

    tex = summary("--format", "latex")[0]
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 5
    assert r"51.50 $\pm$ 0.71" in tex and tex.isascii() and not re.search(r"(?<!\\)[_%#]", tex)
    for tabular in tex.split(r"\begin{tabular}")[1:]:
        letters = re.match(r"\{(l+)\}", tabular)[1]
        counts = [line.count("&") + 1 for line in tabular.splitlines() if line.endswith(r" \\")]
        assert len(counts) > 1 and set(counts) == {len(letters)}

    tables = summary()[0].split("### ")[1:]
    assert [table[:7] for table in tables] == ["Table 1", "Table 2", "Table 3", "Table 4", "Other r"]
    for table in tables:
        pipes = [line.count("|") for line in table.splitlines() if line.startswith("|")]
        assert len(pipes) > 2 and len(set(pipes)) == 1


def test_no_runs_is_said(tmp_path, summary, capsys):
    assert "No finished run in" in summary()[0]
    with pytest.raises(SystemExit) as stop:
        summarize.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2 and "nowhere: no such directory" in capsys.readouterr().err


def test_published_rows_are_the_papers():
    first = run_table.table_rows(1)
    combinations = [[], ["BYOT"], ["DML"], ["PSKD"], ["PSKD", "BYOT"], ["PSKD", "DML"], ["BYOT", "DML"]]
    assert [row["methods"] for row in first] == 3 * [*combinations, ["PSKD", "BYOT", "DML"]]
    assert (first[23]["aurc"], first[7]["ece"]) == (45.71, 4.15)
