"""Classify image files with a trained run, stopping at the first exit that is confident enough.

Prints per image the class, its confidence, which classifier decided, and the multiply-adds that it took as a share of
the backbone's. Confidence is after each classifier's temperature, fitted where the run had --val_split. A folder
stands for the JPEG and PNG files in it and below. A file that is not an image gives one line, and the others continue.
"""

import argparse
import csv
import signal
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.loader import resize
from data.readers import read_pixels
from models import load_run
from models.exits import confidence
from utils.errors import UserError
from utils.flags import number_type

SUFFIXES = {".jpg", ".jpeg", ".png"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    text = "confidence in 0..1 at which an exit decides (default: 1.01, never; results.json has one chosen for the run)"
    parser.add_argument("--threshold", type=number_type(float, 0, 10), default=1.01, metavar="T", help=text)
    parser.add_argument("--epoch", choices=("last", "best"), default="last", help="(default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there instead of printing it")
    args = parser.parse_args(argv)
    try:
        if args.csv:
            args.csv.touch()  # before the work, not after it
        model, info = load_run(args.run, args.epoch)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if info["temperatures"] is None:
        text = "confidences are not calibrated: the run had no --val_split to fit temperatures on"
        print(f"note: {text}", file=sys.stderr)
    costs, backbone = model.multiply_adds(info["image_size"])
    if args.threshold > 1:
        costs[-1] = backbone  # no exit is computed
    paths, rows = [], []
    for path in args.images:
        paths += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) or [path]
    for path in tqdm(paths, unit="img", leave=False, disable=None):  # None: without a terminal
        try:
            pixels = resize(torch.tensor(read_pixels(path))[None], info["image_size"])
        except UserError as e:
            tqdm.write(f"error: {e}", file=sys.stderr)
            continue
        images = normalize(pixels.permute(0, 3, 1, 2) / 255, info["mean"], info["std"])  # (1, 3, S, S), as in training
        logits, decided_by = model.predict_early(images, args.threshold)
        name, number = info["class_names"][logits.argmax()], decided_by.item()
        is_final = number == model.num_stages
        i = -1 if is_final else number - 1
        certainty = confidence(logits[0], model.temperatures[i]).item()
        rows.append((path, name, certainty, "final" if is_final else f"exit {number}", 100 * costs[i] / backbone))
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["image", "class", "confidence", "decided by", "multiply-adds (% of the backbone)"])
            writer.writerows(rows)
    else:
        for path, name, certainty, classifier, share in rows:
            print(f"{path}: {name}  {100 * certainty:.1f} %  ({classifier}, {share:.0f} % of the multiply-adds)")
    return 0 if len(rows) == len(paths) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    try:
        sys.exit(main())
    except OSError as e:
        sys.exit(f"error: {e}")
