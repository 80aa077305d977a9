"""Classify image files with a trained run, stopping at the first exit that is confident enough.

usage: python scripts/predict.py RUN IMAGE... [--threshold T] [--epoch best] [--csv FILE]

Prints per image the class, its confidence, which classifier decided, and the multiply-adds that it took as a share of
the backbone's. Confidence is after each classifier's temperature, fitted where the run had --val_split. A folder
stands for the JPEG and PNG files in it and below. A file that is not an image gives one line, and the others continue.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torchvision.transforms import functional as transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.loader import resize
from data.readers import read_pixels
from models import load_run
from models.exits import confidence
from utils.flags import number_type
from utils.runtime import UserError

BATCH_SIZE = 128  # images; on a CPU as fast per image as larger ones
SUFFIXES = {".jpg", ".jpeg", ".png"}


def list_images(paths: list[Path]) -> list[Path]:
    """The files among the paths, and the images below the folders."""
    found = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    return found


def read_image(path: Path, info: dict) -> torch.Tensor:
    """(3, S, S) float32, resized and normalised as in training.

    Raises:
        UserError: not an intact JPEG or PNG file.
    """
    pixels = torch.tensor(read_pixels(path))
    pixels = resize(pixels[None], info["image_size"])[0].permute(2, 0, 1)
    return transforms.normalize(pixels / 255, info["mean"], info["std"])


def classify(model, info: dict, images: torch.Tensor, threshold: float) -> list[tuple[str, float, str, float]]:
    """images (N, 3, S, S) -> per image (class, confidence, deciding classifier, % of the backbone's multiply-adds)."""
    costs, backbone = model.multiply_adds(info["image_size"])
    logits, decided_by = model.predict_early(images, threshold)
    rows = []
    for z, number in zip(logits, decided_by.tolist(), strict=True):
        is_final = number == model.num_stages
        cost = (backbone if threshold > 1 else costs[-1]) if is_final else costs[number - 1]
        certainty = confidence(z, model.temperatures[-1 if is_final else number - 1]).item()
        name = info["class_names"][z.argmax().item()]
        rows.append((name, certainty, "final" if is_final else f"exit {number}", 100 * cost / backbone))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[2])
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
        print(
            "note: confidences are not calibrated: the run had no --val_split to fit temperatures on", file=sys.stderr
        )
    paths, rows, failed = list_images(args.images), [], 0
    for start in tqdm(range(0, len(paths), BATCH_SIZE), unit="batch", leave=False, disable=not sys.stderr.isatty()):
        images, names = [], []
        for path in paths[start : start + BATCH_SIZE]:
            try:
                images.append(read_image(path, info))
                names.append(path)
            except UserError as e:
                failed += 1
                print(f"error: {e}", file=sys.stderr)
        if images:
            results = classify(model, info, torch.stack(images), args.threshold)
            rows += [(path, *result) for path, result in zip(names, results, strict=True)]
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["image", "class", "confidence", "decided by", "multiply-adds (% of the backbone)"])
            writer.writerows(rows)
    for path, name, certainty, classifier, share in rows if not args.csv else ():
        print(f"{path}: {name}  {100 * certainty:.1f} %  ({classifier}, {share:.0f} % of the multiply-adds)")
    if not paths:
        print("error: no image was given", file=sys.stderr)
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
