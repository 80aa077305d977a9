"""scripts/train_table.py, the shell scripts that call it, and scripts/run_commands.py, which runs its commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_commands
import train_table
from paper import SETTINGS

import main

SCRIPTS = Path(train_table.__file__).parent
ROW8 = "cifar100_resnet18_PSKD_BYOT_DML_seed4"
SMALL = "--data_type synthetic --classes 10 --width 4 --image_size 16 --limit_train 8 --limit_val 8 --device cpu"


@pytest.fixture
def dry_run(monkeypatch, capfd):
    """dry_run(*argv, **environment) -> run name -> command."""

    def call(*argv, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert train_table.main([argv[0], "--dry-run", *argv[1:]]) == 0
        return {line.split()[-1]: line for line in capfd.readouterr().out.splitlines()}

    return call


def python(code: str, name: str) -> str:
    """A command of the run `name`."""
    return shlex.join([sys.executable, "-c", f"import os, sys\n{code}", name])


@pytest.mark.parametrize("table", "1234")
def test_shell_scripts_pass_their_table_and_arguments(table, tmp_path):
    command = [SCRIPTS / f"table{table}.sh", "2", "--dry-run"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": "echo"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{SCRIPTS}/train_table.py {table} 2 --dry-run\n"


@pytest.mark.parametrize(
    ("argv", "variable", "message"),
    [
        ("25", "", "25: not a row (1 to 24)"),
        ("8-1", "", "8-1: not a row"),
        ("1-8 -- --alpha_T 2", "", "--alpha_T"),  # refused once, not by each of the eight runs
        ("-- --label_smoothing 0.1", "", "--label_smoothing"),  # refused by the rows with PS-KD alone
        ("8 -- --run_name mine", "", "--run_name"),
        ("", "SEEDS=x", "--seed"),
        ("", "EPOCHS=ten", "--end_epoch"),
        ("", "JOBS=0", "JOBS=0"),
    ],
)
def test_bad_usage_is_one_error_before_any_run(argv, variable, message, monkeypatch, capfd):
    if variable:
        monkeypatch.setenv(*variable.split("="))
    monkeypatch.setattr(os, "execv", None)  # which starts the runs
    with pytest.raises(SystemExit) as stop:
        train_table.main(["1", *argv.split()])
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert not out
    assert err.count("error:") == 1
    assert message in err.splitlines()[-1]


def test_commands_and_run_names(dry_run):
    command = f"{sys.executable} main.py --classifier_type=resnet18 --PSKD --BYOT --DML --seed 4 --run_name {ROW8}"
    runtime = ["--workers", "2", "--device=cpu", "--compile", "--allow_change=end_epoch", "--save_predictions"]
    assert dry_run("1", "8") == {ROW8: command}
    assert list(dry_run("1", "8", "--", *runtime)) == [ROW8]
    rows = ["BYOT_DML", "PSKD_BYOT_DML", "BYOT"]
    assert list(dry_run("1", "7-8", "8", "2")) == [f"cifar100_resnet18_{row}_seed4" for row in rows]
    assert len(dry_run("1", "resnet50")) == 8
    for table, suffixes in (("3", ["", "_k2", "_k3"]), ("4", ["", "_blocks3", "_blocks2"])):
        assert list(dry_run(table)) == [ROW8.replace("_seed", f"{suffix}_seed") for suffix in suffixes]
    extra = ["--data_type", "synthetic", "--limit_train=64", "--lr_decay_schedule", "1", "2", "--DML_as_published"]
    (name,) = dry_run("1", "3", "--", *extra, EPOCHS="30")
    assert name == "synthetic_resnet18_DML_DML_as_published_ep30_limit_train64_lr_decay_schedule1-2_seed4"


def test_one_experiment_has_one_name(dry_run):
    for text in ("0.1", "0.10", "1e-1"):
        assert list(dry_run("1", "1", "--", "--alpha", text)) == ["cifar100_resnet18_baseline_seed4"]  # the default
    for text in ("0.2", "0.20", "2e-1"):
        assert list(dry_run("1", "1", "--", "--alpha", text)) == ["cifar100_resnet18_baseline_alpha0.2_seed4"]


def test_study_trains_its_ten_settings_seed_by_seed(tmp_path):
    environment = {**os.environ, "SEEDS": "1 2", "EPOCHS": "", "PYTHON": sys.executable}
    command = [SCRIPTS / "study.sh", "--dry-run", "--data_path", str(tmp_path)]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [main.parse_args(shlex.split(line)[2:]) for line in lines]
    assert [args.run_name for args in runs] == [f"{name}_seed{seed}" for seed in (1, 2) for name in SETTINGS]
    assert [args.seed for args in runs] == 10 * [1] + 10 * [2]
    losses = {(args.PSKD, args.BYOT, args.DML, args.alpha, args.beta, args.label_smoothing) for args in runs}
    assert len(losses) == 10
    beta = main.default_args().beta
    assert {(False, True, False, 0.0, 0.0, 0.0), (False, False, False, 0.1, beta, 0.1)} < losses
    for args in runs:
        assert (args.classes, args.val_split, args.width, args.lr_decay_schedule) == (20, 0.1, 16, [30, 45])
        assert (args.data_path, args.experiments_dir) == (str(tmp_path), "experiments/study")


@pytest.mark.slow
def test_runs_of_a_table_are_trained_once(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "EPOCHS": "1", "EXPERIMENTS": str(tmp_path)}
    command = [SCRIPTS / "table1.sh", "1", "--", *SMALL.split()]
    for words in (" parameters), 8 training", "is finished (1 epochs)"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert words in done.stdout


def test_a_failed_run_stops_no_other(capfd):
    commands = [python("print(sys.argv[-1]); sys.exit(sys.argv[-1] == 'b')", name) for name in "abc"]
    assert run_commands.run_all(commands[::2], 1, 0) == 0
    assert capfd.readouterr().out == "a\nc\n"
    assert run_commands.run_all(commands, 1, 0) == 1
    assert capfd.readouterr().out == "a\nb\nc\nfailed: 1 of 3 runs: b\n"


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("6", "6")])
def test_lines_of_concurrent_runs_are_prefixed_and_threads_limited(given, used, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    code = "for epoch in range(20): print('epoch', epoch, os.environ['OMP_NUM_THREADS'], flush=True)"
    assert run_commands.run_all([python(code, name) for name in "abc"], 10**9, 0) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{name}: epoch {epoch} {used}" for name in "abc" for epoch in range(20))


@pytest.mark.parametrize(("gpus", "devices"), [(1, ["a", "b", "c"]), (2, ["cuda:0", "cuda:0", "cuda:1"])])
def test_each_concurrent_run_has_one_of_several_gpus(gpus, devices, tmp_path, capfd):
    code = f"os.chdir({str(tmp_path)!r}); os.mkdir(str(os.getpid()))\n"
    code += "while len(os.listdir()) < 3: pass\n"  # all three run at the same time
    code += "print('device', sys.argv[-1])"
    assert run_commands.run_all([python(code, name) for name in "abc"], 3, gpus) == 0
    assert sorted(re.findall(r"device (?:--device=)?(\S+)", capfd.readouterr().out)) == devices


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_closed_output_is_no_failure(jobs, tmp_path):
    commands = [python(f"print('line'); os.mkdir({str(tmp_path / name)!r})", name) for name in "ab"]
    command = [sys.executable, SCRIPTS / "run_commands.py", jobs, "0", *commands]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGHUP, 2), (signal.SIGKILL, 1)])
def test_a_signal_ends_the_runs_and_no_other_starts(number, jobs, tmp_path):
    code = f"""
import signal, time
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
print("waiting", flush=True)
for _ in range(100):
    if not received:
        time.sleep(0.1)
time.sleep(0.5)  # for a second signal
os.mkdir(os.path.join({str(tmp_path)!r}, "-".join([sys.argv[-1], *received])))
sys.exit(1)
"""
    command = [sys.executable, SCRIPTS / "run_commands.py", str(jobs), "0", *(python(code, name) for name in "abc")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(jobs):
        assert next(process.stdout).endswith("waiting\n")
    os.killpg(process.pid, number)  # as a terminal does
    output = process.stdout.read()  # until the runs end, which have the same stdout
    killed = number == signal.SIGKILL
    name = "SIGTERM" if killed else number.name
    assert sorted(os.listdir(tmp_path)) == [f"{run}-{name}" for run in "abc"[:jobs]]
    assert process.wait() == (-number if killed else 128 + number)
    assert output == ("" if killed else "interrupted: rerun the same command (without --overwrite) to resume\n")
