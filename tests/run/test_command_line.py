"""Command lines: what is refused and how, any combination of flags, and the ways in which the command ends."""

import contextlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import read_records, run
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from loss import METHODS
from models import MODELS
from utils.records import Change, find_changes

WRONG = [  # what was typed (`a_file` is a file, `a_folder` a folder), and words of the answer, in this order
    ("--PSDK", "--PSDK"),
    ("'--new\nline'", r"--new\nline"),
    ("--epochs 3", "--epochs mean --end_epoch?"),
    ("--epoch 3", "--epoch mean --end_epoch?"),
    ("--model resnet18", "--model mean --classifier_type?"),
    ("--arch=resnet18", "--arch mean --classifier_type?"),
    ("--data x", "--data mean --data_type or --data_path?"),
    ("--output x", "--output mean --experiments_dir?"),
    ("--batch-size 64", "--batch-size mean --batch_size?"),
    ("--LR 0.1", "--LR mean --lr?"),
    ("--learning_rate 0.1", "--learning_rate mean --lr?"),
    ("--pskd --lr_decay_shedule 3", "--pskd mean --PSKD or --lr_decay_schedule?"),
    ("--warmup_epochs 3 --end_epoch 3", "--warmup_epochs 3 none 3"),
    ("--lr_schedule linear", "--lr_schedule 'linear' step cosine"),
    ("--device mps", "--device 'mps' cpu"),
    ("--device mps:0", "--device 'mps:0' cpu"),
    ("--alpha_T 1.5", "--alpha_T '1.5' number 0 1"),
    ("--BYOT_from_k_block 4", "--BYOT_from_k_block '4' integer 1 3"),
    ("--data_type=--", "--data_type '--'"),
    ("--seed " + "9" * 5000, "--seed integer 0"),
    ("--lr 1e999", "--lr '1e999' number"),
    ("--classes 101", "--classes 101 100 cifar100"),
    ("--val_split 1", "--val_split '1' 0.001 0.9"),
    ("--lr_decay_schedule 225 150", "--lr_decay_schedule 225, 150 ascend"),
    ("--data_type cifar20", "--data_type 'cifar20' cifar100 cifar10 tinyimagenet folder synthetic"),
    ("--precision tf32 --device cpu", "--precision tf32 GPU 8.0 fp32"),
    ("--device cuda:99", "--device 'cuda:99' cpu"),
    ("--cuda_graph --device cpu", "--cuda_graph GPU"),
    ("--allow_change lr", "--allow_change 'lr' end_epoch precision processes"),
    ("--DML_on_output", "--DML_on_output --DML"),
    ("--DML --DML_on_output --DML_as_published", "--DML_on_output --DML_as_published"),
    ("--PSKD --label_smoothing 0.1", "--label_smoothing --PSKD"),
    ("--val_only", "--val_only --resume"),
    ("--resume a_folder --overwrite", "--overwrite --resume"),
    ("--DML --num_resnet_blocks 1", "--num_resnet_blocks 1 block losses 2 4"),
    ("--BYOT --num_resnet_blocks 3 --BYOT_from_k_block 3", "--BYOT_from_k_block 3 1 2"),
    ("--classifier_type resnext50_32x4d --width 8", "--width 8 resnext50_32x4d 16"),
    ("--run_name a/../../b", "--run_name 'a/../../b' --experiments_dir"),
    ("--run_name 'a\nb'", r"--run_name 'a\nb' characters"),
    ("--run_name \udcff", r"--run_name '\udcff' characters"),
    ("--run_name " + "ü" * 128, "--run_name 'üüüü 255 bytes"),
    ("--experiments_dir " + "x" * 256, "--experiments_dir 'xxxx 255 bytes"),
    ("--experiments_dir a_file/below", "--experiments_dir 'a_file/below' directory"),
    ("--resume " + "x" * 300, "--resume 'xxxx 255 bytes"),
    ("--resume a_file/checkpoint_last.pth", "--resume 'a_file/checkpoint_last.pth' exist"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_wrong_command_lines_are_refused_in_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    Path("a_folder").mkdir()
    with pytest.raises(SystemExit) as end:
        main.main(shlex.split(line))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert sorted(os.listdir()) == ["a_file", "a_folder"]
    usage, rest = err.rstrip("\n").split("\n")
    assert usage.startswith("usage: main.py ")
    assert rest.startswith("main.py: error: ")
    for word in words.split():
        assert word in rest, (word, err)
        rest = rest.partition(word)[2]


def test_limits_are_accepted_and_the_run_is_named_after_data_network_methods_and_seed():
    limits = "--alpha_T 0 --alpha 1 --temperature 0.01 --beta 0 --lr 1e-12 --lr_decay_schedule --run_name a/ünïcödé"
    main.parse_args(["--device", "cpu", *limits.split(), *["--BYOT_from_k_block", "3", "--num_resnet_blocks", "1"]])
    words = "--PSKD --DML --data_type synthetic --seed 7 --classifier_type ResNetBeMyOwnTeacher50"
    assert main.parse_args(words.split()).run_name == "synthetic_resnet50_PSKD_DML_seed7"
    text = main.build_parser().format_help()
    assert all(f"--{name}" in text for name in main.build_parser().names("experiment", "runtime", "machine"))


def test_every_flag_has_a_kind():
    derived = {"exits", "weights_digest"}
    flags = set(vars(main.default_args())) - derived
    assert main.build_parser().names("experiment") == flags - main.RUNTIME_FLAGS
    assert main.PER_MACHINE == {"data_path", "workers", "experiments_dir", "weights"} < main.RUNTIME_FLAGS
    assert {"device", "resume", "val_only", "compile", "saveckp_freq", "allow_change"} < main.RUNTIME_FLAGS
    assert main.RUNTIME_FLAGS.isdisjoint({"PSKD", "alpha", "data_type", "width", "seed", "precision", "sync_bn"})


def test_a_value_that_one_side_lacks_is_its_default_or_off():
    now = vars(main.default_args())
    older = {name: value for name, value in now.items() if name not in ("weight_decay", "label_smoothing")}
    assert find_changes(older, now, now) == find_changes(now, older, now) == []
    assert find_changes(now | {"unknown": 0.0, "other": None}, now, now) == []
    assert find_changes(older, now | {"weight_decay": 0.1}, now) == [Change("weight_decay", 0.0005, 0.1)]
    assert find_changes(now | {"unknown": 0.1}, now, now) == [Change("unknown", 0.1, None)]


def test_default_args_touch_no_device(monkeypatch):
    monkeypatch.setattr("torch.zeros", None)
    monkeypatch.setattr("torch.cuda.is_available", None)
    defaults = main.default_args()
    assert (defaults.device, defaults.precision, defaults.end_epoch) == ("auto", "auto", 300)


def test_default_drops_may_change_with_the_length():
    words = ["--allow_change", "end_epoch"]
    assert main.parse_args(words).allow_change == ["end_epoch", "lr_decay_schedule"]
    assert main.parse_args([*words, "--lr_decay_schedule", "150"]).allow_change == ["end_epoch"]


@pytest.mark.parametrize(
    ("epochs", "drops"), [(300, [150, 225]), (61, [31, 46]), (4, [2, 3]), (3, [2, 3]), (2, [1, 2]), (1, [1])]
)
def test_the_learning_rate_drops_at_a_half_and_three_quarters(epochs, drops):
    assert main.parse_args(["--end_epoch", str(epochs)]).lr_decay_schedule == drops


def power(low: float, high: float):
    return st.floats(low, high).map(lambda x: 10**x)


VALUES = {
    "alpha_T": st.floats(0, 1), "alpha": st.floats(0, 1), "temperature": power(-2, 3), "beta": power(-8, 3),
    "BYOT_from_k_block": st.integers(1, 3), "label_smoothing": st.floats(0, 0.9), "classes": st.integers(2, 11),
    "limit_train": st.integers(1, 40), "limit_val": st.integers(1, 25), "val_split": st.floats(0.001, 0.9),
    "classifier_type": st.sampled_from(list(MODELS)), "num_resnet_blocks": st.integers(1, 4), "lr": power(-6, 3),
    "width": st.sampled_from([1, 4, 16]), "batch_size": st.integers(1, 40), "weight_decay": st.floats(0, 1),
    "seed": st.integers(0, 2**32 - 1), "precision": st.sampled_from(["auto", "tf32", "bf16"]),
}  # fmt: skip


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.sets(st.sampled_from([*METHODS, "DML_on_output"])), st.fixed_dictionaries({}, optional=VALUES))
def test_any_flags_are_refused_by_name_or_end_in_finite_metrics(switches, values):
    words = [f"--{name}" for name in switches] + [f"--{name}={value}" for name, value in values.items()]
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run(Path(parent, "run"), *words)
        except SystemExit as e:
            assert e.code == 2
            assert "error: argument --" in err.getvalue()
            assert not os.listdir(parent)
            return
        if status:
            assert status == 1
            assert err.getvalue().startswith("error: ")
            assert err.getvalue().count("\n") == 1
            assert "--" in err.getvalue()  # the flag that is wrong, or the one to change
            return
        for record in read_records(Path(parent, "run")):
            for numbers in (record["train"], *record["val"].values()):
                assert all(math.isfinite(number) for number in numbers.values() if number is not None)
                assert numbers["top1_error"] <= 100


@pytest.mark.slow
def test_ctrl_c_while_pytorch_is_imported_and_a_run_from_a_strange_directory_whose_pager_was_left(tmp_path):
    flags = "--data_type synthetic --width 4 --limit_train 8 --limit_val 8 --end_epoch 1 --device cpu --precision fp32"
    command = [sys.executable, str(ROOT / "main.py"), *flags.split(), "--experiments_dir", str(tmp_path / "ä ö")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait() == -signal.SIGINT
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    bare = {"LANG": "C", "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=bare, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
    assert json.loads(next((tmp_path / "ä ö").rglob("results.json")).read_text())["status"] == "finished"
