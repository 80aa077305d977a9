"""Classify image files with a trained run, stopping at the first exit that is confident enough.

Prints per image the class, its confidence, which classifier decided, and the multiply-adds that it took as a share of
the backbone's. Confidence is after each classifier's temperature, fitted where the run had validation images beside a
test split, or --val_split. A folder stands for the images in it and below, hidden ones left out. Images are prepared as
those that the run was trained on. A file that is not an image gives one line, and the others continue.
"""

import argparse
import csv
import io
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import stored_size
from data.images import list_images, note_skipped, read_image
from data.loader import Loader
from data.readers import Split
from models import load_run
from models.early_exit import confidence, multiply_adds, predict_early
from models.exits import MultiExitNetwork
from utils.calibration import NEVER
from utils.errors import UserError, print_error, printable, run_command
from utils.files import write_output
from utils.parser import Parser, number_type, path_type
from utils.records import classifier_names

BATCH_SIZE = 128
HEADINGS = ("image", "class", "confidence", "decided by", "multiply-adds (% of the backbone)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=path_type, metavar="RUN", help="run directory")
    parser.add_argument("images", type=path_type, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    text = f"confidence at which an exit decides (default: {NEVER}, never; results.json has one chosen for the run)"
    parser.add_argument("--threshold", type=number_type(float, 0, NEVER), default=NEVER, metavar="T", help=text)
    parser.add_argument("--epoch", choices=("last", "best"), default="last", help="(default: %(default)s)")
    parser.add_argument("--csv", type=path_type, metavar="FILE", help="write the table there instead of printing it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Status 1 where a file is not an image, or the run cannot be read."""
    args = parse_args(argv)
    try:
        return predict(args)
    except (UserError, OSError) as e:
        print_error(str(e))
        return 1


def predict(args: argparse.Namespace) -> int:
    if args.csv:
        args.csv.touch()  # before the work, not after it
    model, info = load_run(args.run, args.epoch)
    if not info["is_calibrated"]:
        text = (
            "confidences are not calibrated: the run is unfinished, or has no validation images to fit temperatures on"
        )
        print(f"note: {text}", file=sys.stderr)
    paths = find_images(args.images)
    rows = []
    with tqdm(total=len(paths), unit="img", leave=False, disable=None) as bar:  # None: without a terminal
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            rows += classify(model, info, batch, args.threshold)
            bar.update(len(batch))
    if args.csv:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(HEADINGS)
        writer.writerows(rows)
        write_output(args.csv, table.getvalue().encode("utf-8", "surrogateescape"))  # names as they are
    else:
        for path, name, certainty, classifier, share in rows:
            text = f"{100 * certainty:.1f} %  ({classifier}, {share:.0f} % of the backbone's multiply-adds)"
            print(f"{printable(path)}: {printable(name)}  {text}")
    return 0 if len(rows) == len(paths) else 1


def find_images(given: list[Path]) -> list[str]:
    """Files as they are given, and the images in folders. Raises UserError where a folder holds none."""
    paths = []
    for path in given:
        if not path.is_dir():
            paths.append(str(path))
            continue
        images, others = list_images(path)
        note_skipped(path, others)
        if not images:
            raise UserError(f"{path} holds no image")
        paths += images
    return paths


def classify(model: MultiExitNetwork, info: dict, paths: list[str], threshold: float) -> list[tuple]:
    """A row (HEADINGS) per image; for a file that is none, an error is printed."""
    found, pixels = [], []
    for path in paths:
        try:
            pixels.append(read_image(path, stored_size(info["args"])))
            found.append(path)
        except UserError as e:
            tqdm.write(f"error: {printable(str(e))}", file=sys.stderr)
    if not found:
        return []

    temperatures = info["temperatures"]
    costs, backbone = multiply_adds(model, info["image_size"], temperatures)
    if threshold == NEVER:
        costs["final"] = backbone  # no exit is computed
    names = classifier_names(len(model.stages))
    rows = []
    split = Split(np.stack(pixels), np.zeros(len(pixels), dtype=np.int64))  # labels that nothing reads
    for images, _, index in Loader(split, info["data"], info["image_size"], torch.device("cpu")):  # as for validation
        logits, decided_by = predict_early(model, images, threshold, temperatures)
        for row, image_logits, number in zip(index.tolist(), logits, decided_by.tolist(), strict=True):
            classifier = names[number - 1]
            name = info["class_names"][image_logits.argmax()]
            certainty = confidence(image_logits, temperatures[classifier]).item()
            rows.append((found[row], name, certainty, classifier, 100 * costs[classifier] / backbone))
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    run_command(main)
