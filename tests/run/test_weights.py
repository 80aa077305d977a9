"""--weights: which tensors are taken from a file, and that they define the experiment."""

import os

import pytest
import torch
import torchvision
from helpers import build_network, read, read_checkpoint, run, val_only

import main
from models import load_weights
from utils.errors import UserError


def test_torchvisions_weights_are_taken_but_those_of_other_shapes(tmp_path):
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    model = build_network("resnet18", "--BYOT", width=64)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = load_weights(model, str(tmp_path / "resnet18.pth"))
    assert line == f"99 of 162 tensors are from {tmp_path}/resnet18.pth; initial weights in: conv1, fc, exits"
    for name, tensor in model.state_dict().items():
        is_kept = name.split(".")[0] in ("conv1", "fc", "exits")
        assert torch.equal(tensor, own[name] if is_kept else weights[name])


def test_a_file_without_a_tensor_of_the_network_is_an_error(tmp_path):
    file = tmp_path / "weights.pth"
    counts = {"bn1.num_batches_tracked": torch.tensor(7)}  # which are no weights
    torch.save({"conv1.weight": torch.zeros(3), "conv": torch.zeros(8, 3, 3, 3), **counts}, file)
    with pytest.raises(UserError, match="none of the 2 tensors"):
        load_weights(build_network("resnet18"), str(file))


def save_code(file):
    torch.save({"conv1.weight": os.system}, file)


@pytest.mark.parametrize("make", [lambda file: None, os.mkfifo, os.mkdir, save_code, lambda f: f.touch()])
def test_what_holds_no_weights_is_an_error_of_one_line(make, tmp_path, capsys):
    file = tmp_path / "weights.pth"
    make(file)
    with pytest.raises(SystemExit) as caught:
        main.parse_args(["--device", "cpu", "--weights", str(file)])
    assert caught.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"main.py: error: argument --weights: {file}")


@pytest.fixture
def pretrained(tmp_path):
    """A run whose exits' classifiers no loss trains."""
    assert run(tmp_path / "pretrained", "--DML") == 0
    return tmp_path / "pretrained"


ONE_EPOCH = ("--DML", "--end_epoch", "1", "--seed", "5")


def test_a_run_starts_from_the_weights_of_another_and_resumes(pretrained, tmp_path, capsys, refused):
    directory = tmp_path / "run"
    assert run(directory, *ONE_EPOCH, "--weights", str(pretrained)) == 0
    line = f"note: --weights: 162 of 162 tensors are from {pretrained}; initial weights in: none\n"
    assert line in capsys.readouterr().out
    assert line in (directory / "experiment.log").read_text()
    untrained = "exits.0.fc.weight"
    weights = [read_checkpoint(path)["model"][untrained] for path in (pretrained, directory)]
    torch.testing.assert_close(*weights, rtol=0.01, atol=0)  # weight decay alone has changed it
    assert len(read(directory, "config.json")["weights_digest"]) == 16

    moved = (pretrained / "checkpoint_last.pth").rename(tmp_path / "moved.pth")
    longer = (*ONE_EPOCH, "--end_epoch", "2", "--allow_change", "end_epoch")
    assert run(directory, *longer, "--weights", str(moved)) == 0
    assert "--weights" not in capsys.readouterr().out
    moved.unlink()
    assert val_only(directory, tmp_path / "val") == 0
    assert "--allow_change weights_digest continues" in refused(run, directory, *longer)
    assert run(directory, *longer, "--allow_change", "weights_digest") == 0


def test_weights_that_overwrite_would_remove_are_refused(pretrained, refused):
    error = refused(run, pretrained, *ONE_EPOCH, "--overwrite", "--weights", str(pretrained))
    assert f"--overwrite would remove {pretrained}" in error
    assert (pretrained / "checkpoint_last.pth").exists()


def test_other_weights_are_another_experiment(pretrained, tmp_path, refused):
    directory = tmp_path / "run"
    assert run(directory, *ONE_EPOCH) == 0
    assert "weights_digest None -> " in refused(run, directory, *ONE_EPOCH, "--weights", str(pretrained))
