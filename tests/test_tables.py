"""scripts/: the table drivers with a stand-in for main.py, and summarize.py on run directories made by hand."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import run_table
import summarize

SCRIPTS = Path(run_table.__file__).parent
STUDY = SCRIPTS / "results" / "cifar100_width16.jsonl"
ROW8 = "cifar100_resnet18_PSKD_BYOT_DML_seed4"
MAIN = """#!{python}
# Stands in for `python main.py`: fails for DML alone, and with --image_size waits for signals.
import json, os, pathlib, signal, sys, time
flags = sys.argv[2:]
name = flags[flags.index("--run_name") + 1]
run = pathlib.Path(flags[flags.index("--experiments_dir") + 1], name)
run.mkdir(parents=True, exist_ok=True)
log = open(run.parent / "log", "a", buffering=1)
print(name, file=log)
if "--image_size" in flags:
    received = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
    print("waiting", flush=True)
    for _ in range(200):
        if not received:
            time.sleep(0.1)
    time.sleep(0.5)  # for a second signal
    print(*received, file=log)
    sys.exit(1)
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
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers would outlive the test
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
    assert len(dry_run(capfd, "1", "resnet50")) == 8
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
    (runs / "cifar100_resnet18_PSKD_seed4" / "results.json").write_text("{")  # damaged: trained again
    assert run_table.main(["1", "2-4"]) == 1
    assert run_table.main(["1", "2", "--", "--overwrite"]) == 0
    names = (runs / "log").read_text().replace("cifar100_resnet18_", "").replace("_seed4", "").split()
    assert names == ["BYOT", "DML", "PSKD", "DML", "PSKD", "BYOT"]


@pytest.mark.parametrize(("given", "used"), [("", "1"), ("6", "6")])
def test_lines_of_concurrent_runs_are_prefixed_and_threads_divided(given, used, runs, monkeypatch, capfd):
    monkeypatch.setenv("JOBS", "64")
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert run_table.main(["1", "1", "4", "8"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "epoch" in line]
    assert len(lines) == 3 * 20
    assert all(re.fullmatch(rf"cifar100_resnet18_\w+_seed4: epoch \d+ {used}", line) for line in lines)


@pytest.mark.parametrize(("gpus", "devices"), [(1, ["-", "-", "-"]), (2, ["cuda:0", "cuda:0", "cuda:1"])])
def test_each_concurrent_run_has_one_of_several_gpus(gpus, devices, runs, capfd):
    runs.mkdir()
    lines = [f"import os, sys; os.chdir({str(runs)!r}); os.mkdir(sys.argv[1])"]
    lines += ["while len(os.listdir()) < 3: pass", "print('device', sys.argv[-1])"]  # all three run at the same time
    command = [sys.executable, "-c", "\n".join(lines)]
    commands = {name: [*command, name, "--device=-"] for name in "abc"}
    assert run_table.run_all(commands, runs, overwrite=False, jobs=3, gpus=gpus) == 0
    assert sorted(re.findall(r"device --device=(\S+)", capfd.readouterr().out)) == devices


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGHUP, 2), (signal.SIGKILL, 1)])
def test_a_signal_ends_the_runs_and_no_other_starts(number, jobs, runs):
    command = [sys.executable, SCRIPTS / "run_table.py", "1", "1-4", "--", "--image_size", "64"]
    environment = {**os.environ, "JOBS": str(jobs)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    waiting = 0
    while waiting < jobs:
        waiting += next(process.stdout).endswith("waiting\n")
    os.killpg(process.pid, number)  # as a terminal does
    output = process.stdout.read()  # until the run ends, which has the same stdout
    killed = number == signal.SIGKILL
    log = (runs / "log").read_text().splitlines()
    assert len(log) == 2 * jobs and log[jobs:] == ["SIGTERM" if killed else number.name] * jobs
    assert process.wait() == (-number if killed else 128 + number)
    assert "start" not in output and "FAILED" not in output
    assert killed or "rerun the same command" in output


# summarize.py


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.7, "ece": 4.0, "aurc": 50.0, "eaurc": 20.0}


def make_run(root, name, top1, seed=1, device="H200", results=(), last=(), **flags):
    """A run directory; row 8 of Table 1 in the paper's setting unless the flags differ."""
    usual = {"classifier_type": "resnet18", "PSKD": True, "BYOT": True, "DML": True, "end_epoch": 300}
    config = {**usual, "precision": "fp32", "workers": 4, "run_name": name, **flags, "seed": seed, "torch": "2.8"}
    config |= {"device_name": device, "git_commit": "0123456", "data": {"class_names": ["a"], "mean": [0.12345678]}}
    last = {"val": metrics(top1), "exits": [], "ensemble": None, **dict(last)}
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


@pytest.mark.parametrize("words", [[], ["--pairs", "baseline"], ["--all_classifiers"]])
def test_study_file_gives_the_published_page(words, summary):
    out = summary(*words, path=STUDY)
    assert out.count("| resnet18 |") >= 7 and out in STUDY.with_name("README.md").read_text()


def test_best_epoch_is_of_the_test_split(summary):
    (row,) = cells(summary("--best", path=STUDY), methods="baseline")
    assert row["top-1 err (%)"] == "76.62 ± 0.90"  # of 76.09, 77.66 and 76.10


def test_mean_deviation_difference_and_mark(tmp_path, summary):
    for seed, top1 in ((1, 20.5), (2, 21.5), (3, 22.5)):  # mean 21.5, deviation 1; published 20.03: within 2
        make_run(tmp_path, f"a{seed}", top1, seed, results={"hours": 5.5})
    for seed, top1 in ((1, 20.2), (2, 20.4)):  # mean 20.3, deviation .14; published 19.94: over 2
        make_run(tmp_path, f"b{seed}", top1, seed, BYOT=False, DML=False)
    make_run(tmp_path, "c1", 30.0, PSKD=False, BYOT=False, DML=False)  # one run has no deviation and no mark
    out = summary()
    (row8,), (row4,), (row1,) = (cells(out, row=str(row)) for row in (8, 4, 1))
    assert (row8["methods"], row8["n"], row8["seeds"]) == ("PSKD+BYOT+DML", "3", "1 2 3")
    assert row8["top-1 err (%)"] == "21.50 ± 1.00 (20.03, +1.47)"
    assert (row8["s/epoch"], row8["hours"]) == ("10.0 ± 0.0 (32.08)", "5.50 ± 0.00")
    assert (row4["top-1 err (%)"], row4["hours"]) == ("20.30 ± 0.14 (19.94, +0.36*)", "—")
    assert row1["top-1 err (%)"] == "30.00 (21.41, +8.59)"
    assert "- 6 runs, last epoch, made on H200, torch 2.8, commit 0123456" in out
    assert cells(summary("--best"), row="8")[0]["top-1 err (%)"].startswith("20.50 ± 1.00 ")


def test_classifiers_have_their_right_names(tmp_path, summary):
    last = {"exits": [metrics(40.0), None, metrics(21.0)], "ensemble": metrics(19.0)}
    last["calibrated"] = {"val": {"ece": 2.0}, "exits": [{"ece": 1.25}, None, {"ece": 1.5}]}
    make_run(tmp_path, "a", 20.0, last=last)
    (row,) = cells(summary("--table", "2"), row="2")
    assert list(row)[-4:] == ["4/4", "3/4", "1/4", "ensemble"]
    assert (row["4/4"], row["ensemble"]) == ("80.00 (79.76, +0.24)", "81.00 (79.68, +1.32)")
    assert (row["3/4"], row["1/4"]) == ("79.00 (78.92, +0.08)", "60.00 (67.90, -7.90)")  # exchanged in the paper
    rows = [(row["classifier"], row["ECE after T (%)"]) for row in cells(summary("--all_classifiers"))]
    assert rows == [("1/4", "1.25"), ("3/4", "1.50"), ("4/4", "2.00"), ("ensemble", "—")]


COMPARABLE = {"precision": "bf16", "DML_as_published": True}
OTHER = {"width": 8, "alpha": 0.2, "lr_decay_schedule": [15, 23], "future_flag": 1}


@pytest.mark.parametrize(("flag", "value"), [*COMPARABLE.items(), *OTHER.items()])
def test_runs_with_different_flags_are_never_averaged(flag, value, tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "b1", 30.0, seed=2, **{flag: value})
    published = " (20.03, +9.97)" if flag in COMPARABLE else ""
    top1 = {row["methods"]: row["top-1 err (%)"] for row in cells(summary(), row="8")}
    assert top1 == {"PSKD+BYOT+DML": "20.00 (20.03, -0.03)", f"PSKD+BYOT+DML, {flag} {value}": f"30.00{published}"}


def test_runs_of_other_machines_and_versions_are_one_group(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1, workers=1, compile=True, processes=1)
    make_run(tmp_path, "a2", 21.0, seed=2, workers=9, processes=2, label_smoothing=0.0, val_split=None, device="L4")
    file = tmp_path / "a1" / "results.json"
    file.write_text(file.read_text().replace('"eaurc"', '"renamed"'))
    make_run(tmp_path, "b1", 20.0, PSKD=False)
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.50 ± 0.71 (20.03, +0.47)")
    assert row["E-AURC (x 1000)"] == "—"  # one of the two lacks it
    assert row["s/epoch"] == "—"  # seconds on two machines have no mean
    assert "made on H200, torch 2.8, commit 0123456; L4, torch 2.8, commit 0123456" in out


def test_runs_outside_the_papers_tables_have_their_own(tmp_path, summary):
    make_run(tmp_path, "a", 20.0, classifier_type="resnet34")
    out = summary()
    assert out.startswith("### Other runs\n") and cells(out)[0]["network"] == "resnet34"


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


def test_differences_are_paired_by_seed(tmp_path, summary):
    for seed, base, byot in ((1, 30.0, 29.0), (2, 32.0, 30.0)):
        make_run(tmp_path, f"base{seed}", base, seed, PSKD=False, BYOT=False, DML=False)
        make_run(tmp_path, f"byot{seed}", byot, seed, PSKD=False, DML=False)
    make_run(tmp_path, "byot3", 0.0, 3, PSKD=False, DML=False)  # no baseline has seed 3
    (row,) = cells(summary("--pairs", "baseline"))
    assert (row["methods"], row["n"], row["seeds"], row["top-1 err (%)"]) == ("BYOT", "2", "1 2", "-1.50 ± 0.71")
    with pytest.raises(SystemExit):
        summary("--pairs", "base")


def test_export_can_be_read_and_has_no_paths(tmp_path, summary):
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", 20.0 + seed, seed, data_path="/home/me")
    file = tmp_path / "study.jsonl"
    before = summary("--export", str(file))
    assert summary(path=file) == before
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records] == ["a1", "a2"]
    config = records[0]["config"]
    assert config["data"] == {"mean": [0.123457]} and "data_path" not in config and config["device_name"] == "H200"


def test_published_rows_are_the_papers():
    first = run_table.table_rows(1)
    combinations = [[], ["BYOT"], ["DML"], ["PSKD"], ["PSKD", "BYOT"], ["PSKD", "DML"], ["BYOT", "DML"]]
    assert [row["methods"] for row in first] == 3 * [*combinations, ["PSKD", "BYOT", "DML"]]
    assert (first[23]["aurc"], first[7]["ece"]) == (45.71, 4.15)
