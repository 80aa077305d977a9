"""scripts/export.py: a network in a process that does not see this repository."""

import csv
import subprocess
import sys

import export
import predict
import pytest
import torch
from helpers import network_images
from PIL import Image

from models import load_run

ELSEWHERE = """
import json, sys
import numpy as np, torch
from PIL import Image

network = torch.export.load("net.pt2").module()
facts = json.load(open("net.json"))
size = facts["stored_size"]
picture = Image.open("picture.png").convert("RGB").resize((size, 2 * size), Image.Resampling.BILINEAR)
picture = picture.crop((0, size // 2, size, size // 2 + size))
pixels = torch.tensor(np.array(picture)).permute(2, 0, 1)
shape = (facts["image_size"], facts["image_size"])
pixels = torch.nn.functional.interpolate(pixels[None], shape, mode="bilinear", antialias=True)[0] / 255
mean, std = (torch.tensor(facts[name]).view(3, 1, 1) for name in ("mean", "std"))
logits = network(((pixels - mean) / std)[None])["final"] / facts["temperatures"]["final"]
confidence, number = logits.softmax(dim=1).max(dim=1)
answer = [facts["class_names"][number], confidence.item()]
torch.save([answer, network(torch.load("images.pt"))], "answers.pt")
assert not {"models", "utils"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_exported_network_is_the_runs_where_nothing_else_of_this_program_is(finished, tmp_path):
    assert export.main([str(finished), "--out", str(tmp_path / "net.pt2")]) == 0
    images = network_images(num=3)
    torch.save(images, tmp_path / "images.pt")
    picture = tmp_path / "picture.png"
    Image.radial_gradient("L").resize((24, 48)).save(picture)
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], cwd=tmp_path, check=True)
    answer, outputs = torch.load(tmp_path / "answers.pt")

    model, _ = load_run(finished)
    with torch.no_grad():
        logits, _, exit_logits, _ = model(images)
    expected = {"exit 1": exit_logits[0], "exit 2": exit_logits[1], "exit 3": exit_logits[2], "final": logits}
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert predict.main([str(finished), str(picture), "--csv", str(tmp_path / "table.csv")]) == 0
    _, row = csv.reader((tmp_path / "table.csv").open())
    assert [row[1], float(row[2])] == [answer[0], pytest.approx(answer[1], rel=1e-4)]


def test_a_name_that_its_json_would_share_is_refused(finished, tmp_path, refused):
    assert "ends in .pt2 or .onnx" in refused(export.main, [str(finished), "--out", str(tmp_path / "net.json")])


def test_onnx_without_its_packages_is_an_error(finished, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "onnxscript" in refused(export.main, [str(finished), "--out", str(tmp_path / "net.onnx")])
