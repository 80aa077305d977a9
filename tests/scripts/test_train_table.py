"""scripts/run_table.py and the shell scripts that call it, with a stand-in for main.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_table

import main

SCRIPTS = Path(run_table.__file__).parent
ROW8 = "cifar100_resnet18_PSKD_BYOT_DML_seed4"
MAIN = """#!{python}
# Stands in for `python main.py`: fails for DML alone, waits for signals with --image_size, and with --compile ends with
# status 1 when all is done.
import json, os, pathlib, signal, sys, time
os.fstat(1)  # fails where standard output is closed
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
config = json.loads(os.environ["DEFAULTS"])
for word, value in zip(flags, [*flags[1:], "--"]):
    if word.startswith("--"):
        config[word[2:]] = True if value.startswith("--") else int(value) if value.isdecimal() else value
(run / "config.json").write_text(json.dumps(config))
sys.exit("--compile" in flags)  # as where its output is closed at the end
"""
DEFAULTS = vars(main.parse_args(["--device", "cpu"]))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The directory of the stand-in's runs."""
    stub = tmp_path / "python"
    stub.write_text(MAIN.format(python=sys.executable))
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(stub))
    monkeypatch.setenv("EXPERIMENTS", str(tmp_path / "runs"))
    monkeypatch.setenv("DEFAULTS", json.dumps(DEFAULTS))
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
    assert stop.value.code == 2
    assert not out
    assert not runs.exists()
    assert err.count("error:") == 1
    assert message in err.splitlines()[-1]


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
    assert "--lr_decay_schedule 15 23 --end_epoch 30" in command
    assert " ".join(extra) in command


def test_one_experiment_has_one_name(runs, capfd):
    names = {name for text in ("0.1", "0.10", "1e-1") for name in dry_run(capfd, "1", "1", "--", "--alpha", text)}
    assert names == {"cifar100_resnet18_baseline_seed4"}  # 0.1 is the default
    names = {name for text in ("0.2", "0.20", "2e-1") for name in dry_run(capfd, "1", "1", "--", "--alpha", text)}
    assert names == {"cifar100_resnet18_baseline_alpha0.2_seed4"}


def test_another_schedule_has_another_name(runs, monkeypatch, capfd):
    assert list(dry_run(capfd, "1", "1", "--", "--end_epoch", "30")) == [
        "cifar100_resnet18_baseline_ep30_lr_decay_schedule150-225_seed4"
    ]
    monkeypatch.setenv("EPOCHS", "30")
    assert list(dry_run(capfd, "1", "1")) == ["cifar100_resnet18_baseline_ep30_seed4"]


def test_finished_run_on_other_images_or_flags_is_left_to_main(runs, tmp_path, capfd):
    for words in ([], ["--data_path", str(tmp_path)], ["--data_path", str(tmp_path)]):
        assert run_table.main(["1", "1", "--", *words]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines() if "baseline_" in line] == [
        "start", "start", "skip",
    ]  # fmt: skip
    config = runs / "cifar100_resnet18_baseline_seed4" / "config.json"
    config.write_text(config.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    assert run_table.main(["1", "1", "--", "--data_path", str(tmp_path)]) == 0
    assert "start " in capfd.readouterr().out


def test_run_that_is_done_has_not_failed_whatever_its_status(runs, capfd):
    assert run_table.main(["1", "1", "--", "--compile"]) == 0
    assert "FAILED" not in capfd.readouterr().out
    (runs / "cifar100_resnet18_DML_seed4").mkdir()
    for file in ("config.json", "results.json"):  # of an earlier run, which --overwrite was to replace
        content = (
            (runs / "cifar100_resnet18_baseline_seed4" / file).read_text().replace('"seed"', '"DML": true, "seed"')
        )
        (runs / "cifar100_resnet18_DML_seed4" / file).write_text(content)
    assert run_table.main(["1", "3", "--", "--overwrite"]) == 1


@pytest.mark.slow
def test_closed_output_is_no_failure(runs):
    command = f"exec '{sys.executable}' '{SCRIPTS}/run_table.py' 1 1 4 >&-"
    for jobs in ("1", "2"):
        done = subprocess.run(["sh", "-c", command], env={**os.environ, "JOBS": jobs}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(list(runs.glob("*/results.json"))) == 2


def test_study_trains_its_ten_settings_seed_by_seed(tmp_path):
    environment = {**os.environ, "SEEDS": "1 2", "EPOCHS": "80", "PYTHON": "python"}
    command = [SCRIPTS / "study.sh", "--dry-run", "--data_path", str(tmp_path)]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = [main.parse_args(line.split()[2:]) for line in lines]
    assert [args.seed for args in settings] == 10 * [1] + 10 * [2]
    assert len({args.run_name for args in settings}) == 20
    first = [(args.PSKD, args.BYOT, args.DML, args.alpha, args.label_smoothing) for args in settings[:10]]
    assert len(set(first)) == 10
    assert (False, True, False, 0.0, 0.0) in first
    assert (False,) * 3 + (0.1, 0.1) in first
    for args in settings:
        assert (args.classes, args.val_split, args.width, args.lr_decay_schedule) == (20, 0.1, 16, [40, 60])


@pytest.mark.parametrize("variable", ["EPOCHS=010", "EPOCHS=1", "EPOCHS=x", "SEEDS=1 -2", "SEEDS= "])
def test_study_refuses_what_is_no_number(variable):
    environment = dict([*os.environ.items(), variable.split("=")])
    done = subprocess.run([SCRIPTS / "study.sh", "--dry-run"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("study.sh: ")
    assert done.stderr.count("\n") == 1


def test_unknown_home_is_left_as_it_is(runs, monkeypatch, capfd):
    monkeypatch.setenv("EXPERIMENTS", "~nosuch/runs")
    assert len(dry_run(capfd, "1", "1")) == 1


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
    commands = {name: run_table.Run([*command, name, "--device=-"], {}) for name in "abc"}
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
    assert len(log) == 2 * jobs
    assert log[jobs:] == ["SIGTERM" if killed else number.name] * jobs
    assert process.wait() == (-number if killed else 128 + number)
    assert "start" not in output
    assert "FAILED" not in output
    assert killed or "rerun the same command" in output
