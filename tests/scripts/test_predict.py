"""scripts/predict.py on the images that the loaders read: the same classes and confidences, and files that are none."""

import csv

import predict
import pytest
from helpers import run, save_photos

from data import build_loaders
from models import load_run
from utils.engine import predict as predict_split


@pytest.mark.parametrize("methods", ["", "--BYOT", "--BYOT --val_split 0.3"])
def test_predictions_equal_those_of_the_loaders_network(methods, tmp_path, capsys):
    photos, table = tmp_path / "photos", tmp_path / "table.csv"
    save_photos(photos)
    words = f"{methods} --data_type folder --classes 2 --image_size 24 --data_path {photos}"
    assert run(tmp_path / "run", *words.split()) == 0
    model, info = load_run(tmp_path / "run")
    logits, labels = predict_split(model, build_loaders(info["args"], "cpu", split="test"), "fp32")
    costs, backbone = model.multiply_adds(24)
    (photos / "test" / "a" / "0-bad.jpg").write_bytes(b"\xff\xd8 not a photograph")
    for threshold, i, cost in (("1.01", -1, backbone), ("1", -1, costs[-1]), ("0", 0, costs[0])):
        capsys.readouterr()
        argv = [str(tmp_path / "run"), str(photos / "test"), "--threshold", threshold, "--csv", str(table)]
        assert predict.main(argv) == 1  # for the damaged one
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "bad.jpg is not" in error
        assert ("not calibrated" in error) == ("val_split" not in methods)
        _, *rows = csv.reader(table.open())
        scaled = (logits[i] / model.temperatures[i]).softmax(dim=1)
        for (file, *row), probabilities, label in zip(rows, scaled, labels.tolist(), strict=True):
            assert f"test/{'ab'[label]}/" in file
            decided_by = "exit 1" if methods and i == 0 else "final"
            expected = probabilities.max().item(), 100 * cost / backbone
            assert row[::2] == ["ab"[probabilities.argmax()], decided_by]
            assert [float(number) for number in row[1::2]] == pytest.approx(expected, rel=1e-5)
    assert predict.main([str(tmp_path), "x.png"]) == 1 and "no such file" in capsys.readouterr().err
    assert predict.main([str(tmp_path / "run"), file]) == 0
    assert f"{file}: " in capsys.readouterr().out
