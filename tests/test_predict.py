"""scripts/predict.py on the images that the loaders read: the same classes and confidences, and files that are none."""

import csv
import sys

import pytest
from conftest import ROOT
from test_main import run, save_photos

from data import build_loaders
from models import load_run
from utils.engine import predict as predict_split

sys.path.insert(0, str(ROOT / "scripts"))
import predict


@pytest.mark.parametrize("val_split", [(), ("--val_split", "0.3")])
def test_predictions_equal_those_of_the_loaders_network(val_split, tmp_path, capsys):
    save_photos(tmp_path / "photos")
    flags = "--BYOT --data_type folder --classes 2 --image_size 24"
    assert run(tmp_path / "run", *flags.split(), *val_split, "--data_path", str(tmp_path / "photos")) == 0
    model, info = load_run(tmp_path / "run")
    logits, labels = predict_split(model, build_loaders(info["args"], "cpu", split="test"), "fp32")
    costs, backbone = model.multiply_adds(24)
    (tmp_path / "photos" / "test" / "b" / "bad.jpg").write_bytes(b"\xff\xd8 not a photograph")
    for threshold, classifier, decided_by, cost in (("1.01", -1, "final", backbone), ("0", 0, "exit 1", costs[0])):
        argv = [str(tmp_path / "run"), str(tmp_path / "photos" / "test"), "--threshold", threshold]
        capsys.readouterr()
        assert predict.main([*argv, "--csv", str(tmp_path / "table.csv")]) == 1  # for the damaged one
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "bad.jpg is not" in error
        assert ("not calibrated" in error) == (not val_split)
        _, *rows = csv.reader((tmp_path / "table.csv").open())
        assert len(rows) == len(labels) == 8
        scaled = (logits[classifier] / (info["temperatures"] or model.temperatures)[classifier]).softmax(dim=1)
        for row, probabilities, label in zip(rows, scaled, labels.tolist(), strict=True):
            file, name, confidence, by, share = row
            assert f"test/{'ab'[label]}/" in file and name == "ab"[probabilities.argmax()] and by == decided_by
            assert float(confidence) == pytest.approx(probabilities.max().item(), rel=1e-5)
            assert float(share) == pytest.approx(100 * cost / backbone)
    assert predict.main([str(tmp_path), "x.png"]) == 1 and "cannot be read" in capsys.readouterr().err
    assert predict.main([str(tmp_path / "run"), rows[0][0]]) == 0
    assert f"{rows[0][0]}: " in capsys.readouterr().out
