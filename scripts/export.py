"""Write a trained network as a file that PyTorch (`torch.export.load`) or ONNX Runtime runs without this program.

Its input, `images`, is float32 (N, 3, S, S) with any N; its outputs are the logits (N, K) of each trained classifier by
name, `exit 1`, ..., `final`. Beside it, NAME.json says what the classes, sizes and temperatures are, and how a picture
becomes the input.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import stored_size
from models import load_run
from models.exits import MultiExitNetwork
from utils.engine import by_classifier
from utils.errors import UserError, print_error, run_command
from utils.files import write_atomic, write_json
from utils.parser import Parser, path_type

INPUT = (
    "an RGB picture, upright, is resized until its shorter side is stored_size and cut centrally to a square; if"
    " image_size is another, the square is resized to it (both antialiased bilinear, rounded to levels 0 to 255);"
    " divided by 255; then less mean, divided by std, per channel"
)


class ByName(nn.Module):
    """Images -> logits of the named classifiers."""

    def __init__(self, network: MultiExitNetwork, names: list[str]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.network(images)
        return by_classifier([*outputs.exit_logits, outputs.logits], self.names)


def main(argv: list[str] | None = None) -> int:
    """Status 1 where the run cannot be read, or the files cannot be written."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=path_type, metavar="RUN", help="run directory")
    text = "NAME.pt2, or NAME.onnx, which needs the packages onnx and onnxscript"
    parser.add_argument("--out", type=path_type, required=True, metavar="FILE", help=text)
    parser.add_argument("--epoch", choices=("last", "best"), default="last", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        export(args.run, args.epoch, args.out)
    except ImportError as e:
        print_error(f"{e}: pip install onnx onnxscript")
    except (UserError, OSError) as e:
        print_error(str(e))
    else:
        return 0
    return 1


def export(run: Path, epoch: str, out: Path) -> None:
    if out.suffix not in (".pt2", ".onnx"):
        raise UserError(f"{out}: give a name that ends in .pt2 or .onnx")
    model, info = load_run(run, epoch)
    names, size = list(info["temperatures"]), info["image_size"]
    network = ByName(model.to(memory_format=torch.contiguous_format), names)
    any_number = {"images": {0: torch.export.Dim("N")}}
    program = torch.export.export(network, (torch.zeros(2, 3, size, size),), dynamic_shapes=any_number)
    if out.suffix == ".onnx":
        try:
            onnx = torch.onnx.export(program, input_names=["images"], output_names=names, verbose=False)
        except TypeError:  # an old torch.onnx, which takes no exported program
            raise UserError(
                f"{out}: PyTorch {torch.__version__} cannot write it; upgrade torch, onnxscript and onnx"
            ) from None
        onnx.save(out)
    else:
        write_atomic(out, lambda file: torch.export.save(program, file))
    facts = {name: info[name] for name in ("class_names", "mean", "std", "image_size", "temperatures")}
    write_json(out.with_suffix(".json"), {"input": INPUT, "stored_size": stored_size(info["args"])} | facts)
    print(f"written: {out}, {out.with_suffix('.json')}")


if __name__ == "__main__":
    run_command(main)
