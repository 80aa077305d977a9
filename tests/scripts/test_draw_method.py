"""The README's picture."""

import sys

import draw_method
import numpy as np
import pytest
from PIL import Image


def test_picture_is_small_opaque_and_on_white(tmp_path):
    file = tmp_path / "method.png"
    draw_method.main(["--out", str(file)])
    pixels = np.asarray(Image.open(file).convert("RGBA"))
    assert file.stat().st_size < 100_000
    assert (pixels[..., 3] == 255).all()  # also where the page is dark
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()  # nothing is cut off
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 100


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="matplotlib is missing"):
        draw_method.main(["--out", str(tmp_path / "method.png")])
