"""scripts/: the table drivers with a stand-in for main.py, and summarize.py on run directories made by hand."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import run_table
import summarize

SCRIPTS = Path(run_table.__file__).parent
ROW8 = "cifar100_resnet18_PSKD_BYOT_DML_seed4"
MAIN = """#!{python}
# Stands in for `python main.py`: fails for DML alone, and with --image_size waits for a signal.
import json, os, pathlib, signal, sys, time
flags = sys.argv[2:]
name = flags[flags.index("--run_name") + 1]
run = pathlib.Path(flags[flags.index("--experiments_dir") + 1], name)
run.mkdir(parents=True, exist_ok=True)
log = open(run.parent / "log", "a", buffering=1)
print(name, file=log)
if "--image_size" in flags:
    signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", file=log) or sys.exit(143))
    print("waiting", flush=True)
    time.sleep(20)
for epoch in range(20):
    print("epoch", epoch, os.environ.get("OMP_NUM_THREADS"))
if "_resnet18_DML_" in name:
    sys.exit(7)
(run / "results.json").write_text(json.dumps({{"status": "finished"}}))
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The directory of the stand-in's runs."""
    stub = tmp_path / "python"
    stub.write_text(MAIN.format(python=sys.executable))
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(stub))
    monkeypatch.setenv("EXPERIMENTS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def dry_run(capfd, *words):
    """Run name -> command."""
    assert run_table.main([words[0], "--dry-run", *words[1:]]) == 0
    return {line.split()[-1]: line for line in capfd.readouterr().out.splitlines()}


@pytest.mark.parametrize("table", "1234")
def test_shell_scripts_pass_their_table_and_arguments(table, tmp_path):
    command = [SCRIPTS / f"table{table}.sh", "2", "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": "echo"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{SCRIPTS}/run_table.py {table} 2 --dry-run\n"


@pytest.mark.parametrize(
    ("words", "variable", "message"),
    [
        ("25", "", "25: not a row (1 to 24)"),
        ("8-1", "", "8-1: not a row"),
        ("1-8 -- --alpha_T 2", "", "--alpha_T"),  # refused once, not by each of the eight runs
        ("-- --label_smoothing 0.1", "", "--label_smoothing"),  # refused by the rows with PS-KD alone
        ("", "SEEDS=x", "--seed"),
        ("", "EPOCHS=ten", "--end_epoch"),
        ("", "JOBS=0", "JOBS=0"),
    ],
)
def test_bad_usage_is_one_error_before_any_run(words, variable, message, runs, monkeypatch, capfd):
    if variable:
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(SystemExit) as stop:
        run_table.main(["1", *words.split()])
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out and not runs.exists()
    assert err.count("error:") == 1 and message in err.splitlines()[-1]


def test_commands_and_run_names(runs, monkeypatch, capfd):
    monkeypatch.setenv("PYTHON", "python")
    flags = f"--seed 4 --experiments_dir {runs} --run_name"
    command = f"python main.py --classifier_type resnet18 --PSKD --BYOT --DML {flags} {ROW8}"
    runtime = ["--workers", "2", "--device=cpu", "--compile", "--allow_end_epoch_change", "--save_predictions"]
    assert dry_run(capfd, "1", "8") == {ROW8: command}
    assert list(dry_run(capfd, "1", "8", "--", *runtime)) == [ROW8]
    rows = ["BYOT", "BYOT_DML", "PSKD_BYOT_DML"]
    assert list(dry_run(capfd, "1", "7-8", "8", "2")) == [f"cifar100_resnet18_{row}_seed4" for row in rows]
    for table, suffixes in (("3", ["", "_k2", "_k3"]), ("4", ["", "_blocks3", "_blocks2"])):
        assert list(dry_run(capfd, table)) == [ROW8.replace("_seed", f"{suffix}_seed") for suffix in suffixes]
    extra = ["--data_type", "synthetic", "--limit_train=64", "--lr_decay_schedule", "1", "2"]
    monkeypatch.setenv("EPOCHS", "30")
    ((name, command),) = dry_run(capfd, "1", "1", "--", *extra).items()
    assert name == "synthetic_resnet18_baseline_ep30_limit_train64_lr_decay_schedule1-2_seed4"
    assert "--lr_decay_schedule 15 23 --end_epoch 30" in command and " ".join(extra) in command


def test_longest_rows_first_with_several_jobs(runs, monkeypatch, capfd):
    monkeypatch.setenv("SEEDS", "1 2")  # in the paper 28.9 seconds per epoch for row 2, 32.4 for row 5
    for jobs, rows in (("1", ["BYOT", "PSKD_BYOT"]), ("2", ["PSKD_BYOT", "BYOT"])):
        monkeypatch.setenv("JOBS", jobs)
        expected = [f"cifar100_resnet18_{row}_seed{seed}" for seed in (1, 2) for row in rows]
        assert list(dry_run(capfd, "1", "2", "5")) == expected


def test_failures_are_listed_and_finished_runs_skipped(runs, capfd):
    failed = "cifar100_resnet18_DML_seed4"
    assert run_table.main(["1", "2-4"]) == 1
    assert capfd.readouterr().out.endswith(f"failed: 1 of 3 runs\n  {failed}: exit status 7, see {runs / failed}\n")
    assert run_table.main(["1", "2-4"]) == 1
    assert run_table.main(["1", "2", "--", "--overwrite"]) == 0
    names = (runs / "log").read_text().replace("cifar100_resnet18_", "").replace("_seed4", "").split()
    assert names == ["BYOT", "DML", "PSKD", "DML", "BYOT"]


def test_lines_of_concurrent_runs_are_prefixed_and_threads_divided(runs, monkeypatch, capfd):
    monkeypatch.setenv("JOBS", "64")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_table.main(["1", "1", "4", "8"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "epoch" in line]
    assert len(lines) == 3 * 20 and all(re.fullmatch(r"cifar100_resnet18_\w+_seed4: epoch \d+ 1", x) for x in lines)


def test_threads_and_gpus_of_concurrent_runs(monkeypatch):
    gpus = lambda n: [run_table.job_environment(job, 3, n, 8).get("CUDA_VISIBLE_DEVICES") for job in range(3)]  # noqa: E731
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert run_table.job_environment(0, 3, 2, 8)["OMP_NUM_THREADS"] == "6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus(1) == [None, None, None] and gpus(2) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert gpus(2) == ["5", "7", "5"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_run_and_no_other_starts(number, runs):
    command = [sys.executable, SCRIPTS / "run_table.py", "1", "1-4", "--", "--image_size", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.stdout.readline() != "waiting\n":
        pass
    start = time.monotonic()
    process.send_signal(number)
    output = process.stdout.read()  # until the run ends, which has the same stdout
    assert time.monotonic() - start < 10
    signals = [] if number == signal.SIGINT else ["SIGTERM"]  # Python's own handler ends the stand-in on SIGINT
    assert (runs / "log").read_text().splitlines() == ["cifar100_resnet18_baseline_image_size64_seed4", *signals]
    assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or ("rerun the same command" in output and "FAILED" not in output)


# summarize.py


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.7, "ece": 4.0, "aurc": 50.0, "eaurc": 20.0}


def make_run(root, name, top1, seed=1, device="H200", results=(), exits=(), **flags):
    """A run directory; row 8 of Table 1 in the paper's setting unless the flags differ."""
    usual = {"classifier_type": "resnet18", "PSKD": True, "BYOT": True, "DML": True, "end_epoch": 300}
    config = {**usual, "precision": "fp32", "workers": 4, "run_name": name, **flags, "seed": seed, "torch": "2.8"}
    config |= {"device_name": device, "git_commit": "0123456", "data": {"class_names": ["a"], "mean": [0.12345678]}}
    last = {"val": metrics(top1), "exits": list(exits), "ensemble": metrics(19.0) if exits else None}
    best = {**last, "val": metrics(top1 - 1)}
    usual = {"status": "finished", "epochs": 7, "seconds_per_epoch": 10.0, "last": last, "best": best}
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text(json.dumps(config))
    (root / name / "results.json").write_text(json.dumps({**usual, **dict(results)}))


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(*words) -> output of summarize.py on tmp_path."""

    def call(*words, path=tmp_path):
        summarize.main([str(path), *words])
        return capsys.readouterr().out

    return call


def cells(output, **labels):
    """Heading -> cell, for each line of the first table that has these labels."""
    table = output.partition("###")[2].partition("###")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    heads, _, *lines = [[cell.strip() for cell in line] for line in lines]
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    return [row for row in rows if labels.items() <= row.items()]


def test_mean_deviation_difference_and_mark(tmp_path, summary):
    for seed, top1 in ((1, 20.0), (2, 21.0), (3, 22.0)):  # mean 21, deviation 1; published 20.03: within 2
        make_run(tmp_path, f"a{seed}", top1, seed, results={"hours": 5.5})
    for seed, top1 in ((1, 20.2), (2, 20.4)):  # mean 20.3, deviation .14; published 19.94: over 2
        make_run(tmp_path, f"b{seed}", top1, seed, BYOT=False, DML=False)
    make_run(tmp_path, "c1", 30.0, PSKD=False, BYOT=False, DML=False)  # one run has no deviation and no mark
    out = summary()
    (row8,), (row4,), (row1,) = (cells(out, row=str(row)) for row in (8, 4, 1))
    assert (row8["methods"], row8["n"], row8["seeds"]) == ("PSKD+BYOT+DML", "3", "1 2 3")
    assert row8["top-1 err (%)"] == "21.00 ± 1.00 (20.03, +0.97)"
    assert (row8["s/epoch"], row8["hours"]) == ("10.0 ± 0.0 (32.08)", "5.50 ± 0.00")
    assert (row4["top-1 err (%)"], row4["hours"]) == ("20.30 ± 0.14 (19.94, +0.36*)", "—")
    assert row1["top-1 err (%)"] == "30.00 (21.41, +8.59)"
    assert "- 6 runs, last epoch, made on H200, torch 2.8, commit 0123456" in out
    assert cells(summary("--best"), row="8")[0]["top-1 err (%)"].startswith("20.00 ± 1.00 ")


def test_table_2_names_the_classifiers_right(tmp_path, summary):
    make_run(tmp_path, "a", 20.0, exits=[metrics(40.0), None, metrics(21.0)])
    (row,) = cells(summary("--table", "2"), row="2")
    assert list(row)[-5:] == ["4/4", "3/4", "2/4", "1/4", "ensemble"]
    assert row["3/4"] == "79.00 (78.92, +0.08)"  # printed under 1/4
    assert (row["2/4"], row["1/4"]) == ("— (75.22)", "60.00 (67.90, -7.90)")
    assert row["ensemble"] == "81.00 (79.68, +1.32)"


@pytest.mark.parametrize("flag", ["precision bf16", "width 8", "alpha 0.2", "label_smoothing 0.1", "future_flag 1"])
def test_runs_with_different_flags_are_never_averaged(tmp_path, summary, flag):
    name, value = flag.split()
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "b1", 30.0, seed=2, **{name: value if value == "bf16" else json.loads(value)})
    top1 = {row["methods"]: row["top-1 err (%)"].split()[0] for row in cells(summary(), row="8")}
    assert top1 == {"PSKD+BYOT+DML": "20.00", f"PSKD+BYOT+DML, {flag}": "30.00"}


def test_runtime_flags_and_flags_newer_than_a_run_do_not_split_a_group(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1, workers=1, compile=True, processes=1)
    make_run(tmp_path, "a2", 21.0, seed=2, workers=9, processes=2, label_smoothing=0.0, val_split=None, device="L4")
    (row,) = cells(summary(), row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.50 ± 0.71 (20.03, +0.47)")
    assert row["s/epoch"] == "— (32.08)"  # seconds on two machines have no mean


def test_published_numbers_only_in_the_papers_setting(tmp_path, summary):
    make_run(tmp_path, "a", 20.0, end_epoch=30, lr_decay_schedule=[15, 23])
    out = summary()
    assert cells(out, row="8")[0]["top-1 err (%)"] == "20.00" and "20.03" not in out
    assert "- all runs, unlike the paper: end_epoch 30, lr_decay_schedule (15, 23)\n" in out
    make_run(tmp_path, "b", 20.0, precision="bf16", DML_as_published=True)  # comparable
    assert "20.00 (20.03, -0.03)" in [row["top-1 err (%)"] for row in cells(summary(), row="8")]


def test_unusable_runs_are_named_and_not_averaged(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "again", 90.0, seed=1)
    make_run(tmp_path, "cut", 90.0, seed=2, results={"status": "interrupted"})
    for name, content in (("list", "[]"), ("empty", ""), ("bare", '{"status": "finished"}')):
        make_run(tmp_path, name, 90.0, seed=4)
        (tmp_path / name / "results.json").write_text(content)
    make_run(tmp_path, "young", 90.0, seed=5)
    (tmp_path / "young" / "results.json").unlink()
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1", "20.00 (20.03, -0.03)")
    reasons = re.findall(r"- left out: \S+/(\w+ \(.{12})", out)
    assert [reason.split()[0] for reason in reasons] == ["again", "bare", "cut", "empty", "list", "young"]
    assert {"again (the same fla", "bare (no entry 'la", "cut (interrupted,"} <= set(reasons)


@pytest.fixture
def study(tmp_path):
    """Two seeds each of the baseline and of BYOT, with a test split, calibration and early exit."""
    off = {"PSKD": False, "DML": False, "width": 8, "val_split": 0.1}
    for seed, base, byot in ((1, 30.0, 29.0), (2, 32.0, 30.0)):
        test = {"val": metrics(base), "exits": [], "ensemble": None, "calibrated": {"val": {"ece": 3.0}, "exits": []}}
        make_run(tmp_path, f"base{seed}", 90.0, seed, results={"test": {"last": test}}, BYOT=False, **off)
        test = {"val": metrics(byot), "exits": [metrics(40.0), None, metrics(35.0)], "ensemble": metrics(28.0)}
        test["calibrated"] = {"val": {"ece": 2.0 + seed}, "exits": [{"ece": 1.25}, None, {"ece": 1.5}]}
        test["early_exit"] = {"backbone_multiply_adds": 500, "chosen": {"multiply_adds": 200 + 50 * seed}}
        make_run(tmp_path, f"byot{seed}", 90.0, seed, results={"test": {"last": test}}, **off)


def test_test_split_calibration_and_early_exit(study, summary):
    out = summary()
    (base,), (byot,) = cells(out, row="1"), cells(out, row="2")
    assert (base["top-1 err (%)"], base["ECE after T (%)"]) == ("31.00 ± 1.41", "3.00 ± 0.00")
    assert (byot["ECE after T (%)"], byot["early exit (% MACs)"]) == ("3.50 ± 0.71", "55.0 ± 7.1")
    assert base["early exit (% MACs)"] == "—" and "hours" not in base
    rows = cells(summary("--all_classifiers"), methods="BYOT")
    assert [row["classifier"] for row in rows] == ["1/4", "3/4", "4/4", "ensemble"]
    assert [row["top-1 err (%)"].split()[0] for row in rows] == ["40.00", "35.00", "29.50", "28.00"]
    assert [row["ECE after T (%)"].split()[0] for row in rows] == ["1.25", "1.50", "3.50", "—"]
    assert rows[0]["E-AURC (x 1000)"] == "20.00 ± 0.00"


def test_differences_are_paired_by_seed(study, tmp_path, summary):
    test = {"val": metrics(0.0), "exits": [], "ensemble": None}  # no baseline has seed 3
    off = {"PSKD": False, "DML": False, "width": 8, "val_split": 0.1}
    make_run(tmp_path, "byot3", 0.0, 3, results={"test": {"last": test}}, **off)
    (row,) = cells(summary("--pairs", "baseline"))
    assert (row["methods"], row["n"], row["seeds"]) == ("BYOT", "2", "1 2")
    assert (row["top-1 err (%)"], row["ECE after T (%)"]) == ("-1.50 ± 0.71", "+0.50 ± 0.71")
    with pytest.raises(SystemExit):
        summary("--pairs", "base")


def test_export_roundtrip(study, tmp_path, summary):
    file = tmp_path / "study.jsonl"
    before = summary("--export", str(file))
    assert summary(path=file) == before
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records] == ["base1", "base2", "byot1", "byot2"]
    config = records[0]["config"]
    assert config["data"] == {"mean": [0.123457]} and "workers" not in config and config["device_name"] == "H200"


def test_a_metric_that_an_older_run_lacks_is_a_dash(tmp_path, summary):
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", 20.0, seed)
    file = tmp_path / "a1" / "results.json"
    file.write_text(file.read_text().replace('"eaurc"', '"renamed"'))
    make_run(tmp_path, "b1", 20.0, PSKD=False)
    out = summary()
    assert cells(out, row="8")[0]["E-AURC (x 1000)"] == "—" and cells(out, row="7")[0]["E-AURC (x 1000)"] == "20.00"


def test_published_rows_are_the_papers():
    first = run_table.table_rows(1)
    combinations = [[], ["BYOT"], ["DML"], ["PSKD"], ["PSKD", "BYOT"], ["PSKD", "DML"], ["BYOT", "DML"]]
    assert [row["methods"] for row in first] == 3 * [*combinations, ["PSKD", "BYOT", "DML"]]
    assert (first[23]["aurc"], first[7]["ece"]) == (45.71, 4.15)
