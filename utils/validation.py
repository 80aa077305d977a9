"""`--val_only`: evaluate a checkpoint, or every run under a directory, and touch nothing else."""

import argparse
import functools
import shlex
from pathlib import Path

import torch

from data import DATASETS, build_loaders
from loss import trained_exits
from models import build_model
from utils import distributed
from utils.checkpoint import load_checkpoint, load_states, write_json
from utils.engine import autocast, evaluate, predict
from utils.errors import UserError
from utils.flags import METHODS, build_parser
from utils.logger import results_table
from utils.run_directory import LAST, differences, find_checkpoint

# What --val_only needs to be as it was in training: the flags that define the network and the images.
EVALUATED = (
    "data_type", "classes", "image_size", "val_split", "limit_val", "classifier_type", "num_resnet_blocks", "width",
)  # fmt: skip


def evaluation_command(args, directory: Path) -> str:
    """A line that evaluates the run's last checkpoint."""
    words = ["python", "main.py", "--val_only", "--resume", str(directory), f"--run_name={args.run_name}"]
    words += [f"--{m}" for m in METHODS if getattr(args, m)]
    parser = build_parser()
    for name in (*EVALUATED, "data_path", "experiments_dir", *(["seed"] if args.val_split is not None else [])):
        default = DATASETS[args.data_type].image_size if name == "image_size" else parser.get_default(name)
        if getattr(args, name) != default:
            words += [f"--{name}", str(getattr(args, name))]
    words += ["--precision", args.precision]  # of `auto` another machine may make another
    return shlex.join(words)


def validate_only(args, device: torch.device) -> None:
    """Evaluate a checkpoint, or the last one of every run under a directory; print, and write val.json.

    A single checkpoint must have been trained with the flags in EVALUATED as given now; under a directory of
    runs each is evaluated with its own. Images are where the run had them, unless --data_path says otherwise.

    Raises:
        UserError: flags differ, or a run could not be evaluated (the others are, first).
    """
    path = Path(args.resume)
    runs = distributed.from_main(lambda: [] if (path / LAST).exists() else sorted(path.rglob(LAST)))
    if not runs:
        checkpoint, path, note = distributed.from_main(lambda: find_checkpoint(path))
        if note and distributed.is_main():
            print(note)
        check_flags(checkpoint["args"], vars(args), path)
        record = {"checkpoint": str(path), **evaluate_checkpoint(checkpoint, path, args, device)}
        report({str(path): record}, record, args)
        return
    found, failed = {}, []
    for file in runs:
        try:
            checkpoint = distributed.from_main(lambda: load_checkpoint(file))  # noqa: B023  (called at once)
            found[str(file.parent)] = evaluate_checkpoint(checkpoint, file, args, device)
        except UserError as e:
            failed.append(str(e))
    report(found, found, args)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs could not be evaluated: {'; '.join(failed)}")


def check_flags(before: dict, now: dict, path: Path) -> None:
    """Raises UserError where the checkpoint's flags describe another network or other images than those given."""
    names = {*EVALUATED, *(["seed"] if now["val_split"] is not None else [])}
    differ = differences(before, now, allowed=(before.keys() | now.keys()) - names)
    has_exits = [any(flags.get(m) for m in ("BYOT", "DML")) for flags in (before, now)]
    if has_exits[0] != has_exits[1]:
        differ.append(f"exits (--BYOT or --DML) {has_exits[0]} -> {has_exits[1]}")
    if differ:
        raise UserError(f"{path} was trained with other flags: {', '.join(differ)}; give them as in training")


def evaluate_checkpoint(checkpoint: dict, path: Path, args, device: torch.device) -> dict:
    """The epoch and the metrics of a checkpoint, with the network and the images of its own flags.

    Raises:
        UserError: its flags or its weights are no such, the images are missing, or its logits are not finite.
    """
    here = {"workers": args.workers}
    if args.data_path != build_parser().get_default("data_path"):
        here["data_path"] = args.data_path
    flags = argparse.Namespace(**{**checkpoint["args"], **here})
    try:
        loader = build_loaders(flags, device, split="val")
        model = build_model(flags, loader.num_classes).to(device, memory_format=torch.channels_last)
        load_states(checkpoint, path, model=model)
        logits, labels = predict(model.eval(), loader, functools.partial(autocast, args.precision, device))
        return {"epoch": checkpoint["epoch"], **evaluate(logits, labels, trained_exits(flags))}
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{path} cannot be evaluated: {e}") from None


def report(records: dict[str, dict], content: dict, args) -> None:
    """Print a table a checkpoint, and write `content` to val.json, in the main process."""
    if not records or not distributed.is_main():
        return
    for name, record in records.items():
        print(name, *results_table({"last": record}), sep="\n")
    directory = Path(args.experiments_dir, args.run_name)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "val.json", content)
    print(f"written to {directory / 'val.json'}")
