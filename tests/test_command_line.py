"""Command lines that must be refused, as data: what was typed, and the words that the one line of answer has."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import main

# `a_file` is a file and `a_folder` a directory in the working directory; nothing else is there.
WRONG = [
    # flags that do not exist, or without their value
    ("--PSDK", "--PSDK"),
    ("--pskd", "--pskd"),
    ("--BYOT 1", "unrecognized 1"),
    ("--end 10", "--end"),
    ("--no-PSKD", "--no-PSKD"),
    ("--DML=yes", "--DML yes"),
    ("--momentum 0.9", "--momentum"),
    ("train", "train"),
    ("--lr", "--lr expected"),
    ("--data_type", "--data_type expected"),
    ("--compile --compile_mode fast", "--compile_mode"),
    # numbers that are none, or out of range
    ("--alpha_T 1.5", "--alpha_T '1.5' number 0 1"),
    ("--alpha_T -0.1", "--alpha_T '-0.1' number 0 1"),
    ("--alpha_T nan", "--alpha_T 'nan' number 0 1"),
    ("--alpha much", "--alpha 'much' number 0 1"),
    ("--alpha 1.01", "--alpha '1.01' number 0 1"),
    ("--temperature 0", "--temperature '0' 0.01 1000"),
    ("--temperature inf", "--temperature 'inf' 0.01 1000"),
    ("--beta=-1e-6", "--beta '-1e-6' 0 1000"),
    ("--beta 1,5", "--beta '1,5' number 0 1000"),
    ("--BYOT_from_k_block 0", "--BYOT_from_k_block '0' whole 1 3"),
    ("--BYOT_from_k_block 4", "--BYOT_from_k_block '4' whole 1 3"),
    ("--image_size 8", "--image_size '8' 16 512"),
    ("--image_size 32.0", "--image_size '32.0' whole"),
    ("--image_size 60", "--image_size 60 multiple 8"),
    ("--workers -1", "--workers '-1' 0"),
    ("--classes 1", "--classes '1' 2"),
    ("--classes 101", "--classes 101 100 cifar100"),
    ("--classes 201 --data_type tinyimagenet", "--classes 201 200 tinyimagenet"),
    ("--limit_train 0", "--limit_train '0' 1"),
    ("--limit_val -5", "--limit_val '-5' 1"),
    ("--val_split 0", "--val_split '0' 0.001 0.9"),
    ("--val_split 1", "--val_split '1' 0.001 0.9"),
    ("--val_split 10%", "--val_split '10%' number"),
    ("--num_resnet_blocks 5", "--num_resnet_blocks '5' 1 4"),
    ("--num_resnet_blocks 0", "--num_resnet_blocks '0' 1 4"),
    ("--width 0", "--width '0' 1 1024"),
    ("--width 2000", "--width '2000' 1 1024"),
    ("--end_epoch 0", "--end_epoch '0' 1"),
    ("--end_epoch 1e2", "--end_epoch '1e2' whole"),
    ("--end_epoch ''", "--end_epoch '' whole"),
    ("--batch_size 0", "--batch_size '0' 1"),
    ("--batch_size 12.5", "--batch_size '12.5' whole"),
    ("--lr 0", "--lr '0' 1000"),
    ("--lr -0.1", "--lr '-0.1' 1000"),
    ("--lr inf", "--lr 'inf' 1000"),
    ("--lr 0.1 0.2", "unrecognized 0.2"),
    ("--lr_decay_rate 2", "--lr_decay_rate '2' 1"),
    ("--lr_decay_schedule 0 10", "--lr_decay_schedule '0' 1"),
    ("--lr_decay_schedule 150,225", "--lr_decay_schedule '150,225' whole"),
    ("--lr_decay_schedule 225 150", "--lr_decay_schedule 225, 150 ascend"),
    ("--lr_decay_schedule 150 150", "--lr_decay_schedule 150, 150 ascend"),
    ("--weight_decay -1", "--weight_decay '-1' 0 1"),
    ("--seed -1", "--seed '-1' 0 4294967295"),
    ("--seed 4294967296", "--seed '4294967296' 0 4294967295"),
    ("--seed four", "--seed 'four' whole"),
    ("--saveckp_freq -1", "--saveckp_freq '-1' 0"),
    # names that are not on the list
    ("--data_type cifar10", "--data_type 'cifar10' cifar100 tinyimagenet synthetic"),
    ("--data_type CIFAR100", "--data_type 'CIFAR100' cifar100"),
    ("--classifier_type resnet20", "--classifier_type 'resnet20' resnet18 resnet50"),
    ("--precision fp16", "--precision 'fp16' fp32 tf32 bf16"),
    ("--device gpu", "--device 'gpu' cpu"),
    ("--device cuda:99", "--device 'cuda:99' cpu"),
    ("--device meta", "--device 'meta' cpu"),
    ("--device ''", "--device '' cpu"),
    # flags that do not go together
    ("--DML_on_output", "--DML_on_output --DML"),
    ("--DML_as_published --BYOT", "--DML_as_published --DML"),
    ("--DML --DML_on_output --DML_as_published", "--DML_on_output --DML_as_published"),
    ("--val_only", "--val_only --resume"),
    ("--resume a_folder --overwrite", "--overwrite --resume"),
    ("--BYOT --num_resnet_blocks 1", "--num_resnet_blocks 1 --BYOT 2 4"),
    ("--DML --num_resnet_blocks 1", "--num_resnet_blocks 1 --DML 2 4"),
    ("--BYOT --num_resnet_blocks 3 --BYOT_from_k_block 3", "--BYOT_from_k_block 3 1 2"),
    ("--classifier_type resnext50_32x4d --width 8", "--width 8 resnext50_32x4d 16"),
    ("--precision tf32 --device cpu", "--precision tf32 GPU fp32 bf16"),
    ("--sync_bn --device cpu", "--sync_bn GPUs"),
    # names and places of files
    ("--run_name ''", "--run_name '' --experiments_dir"),
    ("--run_name .", "--run_name '.' --experiments_dir"),
    ("--run_name ..", "--run_name '..' --experiments_dir"),
    ("--run_name ../x", "--run_name '../x' --experiments_dir"),
    ("--run_name /abs", "--run_name '/abs' --experiments_dir"),
    ("--run_name a/../../b", "--run_name 'a/../../b' --experiments_dir"),
    ("--run_name a/..", "--run_name 'a/..' --experiments_dir"),
    ("--run_name 'a\0b'", r"--run_name 'a\x00b' characters"),
    ("--run_name 'a\nb'", r"--run_name 'a\nb' characters"),
    ("--run_name \udcff", r"--run_name '\udcff' characters"),
    ("--run_name a/" + "x" * 256, "--run_name 'a/xxxx 255"),
    ("--run_name " + "ü" * 128, "--run_name 'üüüü 255 bytes"),
    ("--experiments_dir ''", "--experiments_dir '' directory"),
    ("--experiments_dir a_file", "--experiments_dir 'a_file' directory"),
    ("--experiments_dir a_file/below", "--experiments_dir 'a_file/below' directory"),
    ("--experiments_dir 'a\0b'", r"--experiments_dir 'a\x00b' characters"),
    ("--data_path a_folder/\udcff", r"--data_path 'a_folder/\udcff' characters"),
    ("--resume 'a_folder\t'", r"--resume 'a_folder\t' characters"),
    ("--data_path a_file", "--data_path 'a_file' directory"),
    ("--data_path ''", "--data_path '' directory"),
    ("--resume nowhere", "--resume 'nowhere' exist"),
    ("--resume ''", "--resume '' exist"),
    ("--resume a_file/checkpoint_last.pth", "--resume 'a_file/checkpoint_last.pth' exist"),
    ("--val_only --resume nowhere/checkpoint_best.pth", "--resume 'nowhere/checkpoint_best.pth' exist"),
]
RIGHT = [
    "",
    "--alpha_T 0 --alpha 1 --temperature 0.01 --beta 0 --weight_decay 0 --lr 1e-12 --seed 4294967295",
    "--BYOT --num_resnet_blocks 2 --BYOT_from_k_block 1 --width 2",
    "--BYOT_from_k_block 3 --num_resnet_blocks 1",  # of a method that is off
    "--lr_decay_schedule",
    "--lr_decay_schedule 1 1000",
    "--image_size 16 --classes 100 --val_split 0.9",
    "--run_name a/b --experiments_dir not/yet/there --data_path a_folder",
    "--run_name " + "x" * 255,
    "--run_name 'two words, ünïcödé'",
    "--run_name ...",
]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("not a directory")
    (tmp_path / "a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_file", "a_folder"]
    assert not list((tmp_path / "a_folder").iterdir())


def check(message: str, words: str) -> None:
    """argparse's usage, then one line with all the words in this order."""
    usage, line = message.rstrip("\n").split("\n")
    assert usage.startswith("usage: main.py ")
    prefix, _, rest = line.partition("error: ")
    assert prefix == "main.py: "
    for word in words.split():
        assert word in rest, (word, line)
        rest = rest.partition(word)[2]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_wrong_command_lines_are_refused_in_one_line(line, words, working_directory, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(shlex.split(line))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    check(err, words)


@pytest.mark.parametrize("line", RIGHT)
def test_right_command_lines_are_accepted(line, working_directory):
    main.parse_args(["--device", "cpu", *shlex.split(line)])


def test_a_batch_that_the_processes_cannot_share_is_refused(working_directory, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        main.parse_args(["--batch_size", "128"])
    check(capsys.readouterr().err, "--batch_size 128 3 126 129")


def test_the_real_command_ends_with_status_2(working_directory):
    words = [sys.executable, str(Path(main.__file__)), "--run_name", "../x", "--data_type", "synthetic"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    check(done.stderr, "--run_name '../x' --experiments_dir")
