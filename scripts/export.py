"""Write a trained network as a file that PyTorch (`torch.export.load`) or ONNX Runtime runs without this program.

Its input, `images`, is float32 (N, 3, S, S) with any N; its outputs are the logits (N, K) of each trained classifier by
name, `exit 1`, ..., `final`. Beside it, NAME.json says what the classes, sizes and temperatures are, and how a picture
becomes the input.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import load_run
from models.exits import MultiExitNetwork
from utils.errors import UserError, print_error, run_command, tell
from utils.files import write_atomic
from utils.flags import path_type
from utils.records import classifier_names

INPUT = (
    "an RGB picture, upright, is resized, antialiased bilinear, until its shorter side is image_size, cut centrally to"
    " a square, divided by 255; then less mean, divided by std, per channel"
)


class ByName(nn.Module):
    """Images -> logits of the named classifiers."""

    def __init__(self, network: MultiExitNetwork, names: list[str]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.network(images)
        logits = [*outputs.exit_logits, outputs.logits]
        return {name: z for name, z in zip(classifier_names(len(logits)), logits, strict=True) if name in self.names}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=path_type, metavar="RUN", help="run directory")
    text = "NAME.pt2, or NAME.onnx, which needs the packages onnx and onnxscript"
    parser.add_argument("--out", type=path_type, required=True, metavar="FILE", help=text)
    parser.add_argument("--epoch", choices=("last", "best"), default="last", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".pt2", ".onnx"):
        parser.error(f"argument --out: {str(args.out)!r} must end in .pt2 or .onnx")
    return args


def main(argv: list[str] | None = None) -> int:
    """Status 1 where the run cannot be read, or the files cannot be written."""
    args = parse_args(argv)
    try:
        export(args)
    except (UserError, OSError) as e:
        print_error(str(e))
        return 1
    return 0


def export(args: argparse.Namespace) -> None:
    if args.out.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("ONNX needs two packages: pip install onnx onnxscript")
    model, info = load_run(args.run, args.epoch)
    size, names = info["image_size"], list(info["temperatures"])
    network = ByName(model.to(memory_format=torch.contiguous_format), names)
    images = torch.zeros(2, 3, size, size)
    any_number = {"images": {0: torch.export.Dim("N")}}
    program = torch.export.export(network, (images,), dynamic_shapes=any_number).run_decompositions({})
    if args.out.suffix == ".onnx":
        torch.onnx.export(program, input_names=["images"], output_names=names, verbose=False).save(args.out)
    else:
        write_atomic(args.out, lambda file: torch.export.save(program, file))
    facts = {name: info[name] for name in ("class_names", "mean", "std", "image_size", "temperatures")}
    text = json.dumps({"input": INPUT, **facts}, indent=1) + "\n"
    write_atomic(args.out.with_suffix(".json"), text.encode())
    tell(f"{args.out}: images (N, 3, {size}, {size}) -> {', '.join(names)}; {args.out.with_suffix('.json')} says more")


if __name__ == "__main__":
    run_command(main)
