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
    "data_type",
    "classes",
    "image_size",
    "val_split",
    "limit_val",
    "classifier_type",
    "num_resnet_blocks",
    "width",
)


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
    if path.is_dir() and not (path / LAST).exists() and (runs := sorted(p.parent for p in path.rglob(LAST))):
        sources = [run / LAST for run in runs]
    else:
        checkpoint, path, note = find_checkpoint(path)
        if note and distributed.is_main():
            print(note)
        sources = [path]
        before, now = checkpoint["args"], vars(args)
        names = {*EVALUATED, *(["seed"] if args.val_split is not None else [])}
        differ = differences(before, now, allowed=(before.keys() | now.keys()) - names)
        has_exits = [any(flags.get(m) for m in ("BYOT", "DML")) for flags in (before, now)]
        if has_exits[0] != has_exits[1]:
            differ.append(f"exits (--BYOT or --DML) {has_exits[0]} -> {has_exits[1]}")
        if differ:
            raise UserError(f"{path} was trained with other flags: {', '.join(differ)}; give them as in training")

    found, failed = {}, []
    for source in sources:
        try:
            found[str(source if len(sources) == 1 else source.parent)] = evaluate_checkpoint(source, args, device)
        except UserError as e:
            if len(sources) == 1:
                raise
            failed.append(str(e))
    if distributed.is_main():
        for source, record in found.items():
            print(source, *results_table({"last": record}), sep="\n")
        directory = Path(args.experiments_dir, args.run_name)
        directory.mkdir(parents=True, exist_ok=True)
        single = {"checkpoint": str(path), **record} if len(sources) == 1 else None
        write_json(directory / "val.json", single or found)
        print(f"written to {directory / 'val.json'}")
    if failed:
        raise UserError(f"{len(failed)} of {len(sources)} runs could not be evaluated: {'; '.join(failed)}")


def evaluate_checkpoint(path: Path, args, device: torch.device) -> dict:
    """The epoch and the metrics of a checkpoint, with the network and the images of its own flags.

    Raises:
        UserError: the file is no whole checkpoint, or its logits are not finite.
    """
    checkpoint = load_checkpoint(path)
    here = {"workers": args.workers}
    if args.data_path != build_parser().get_default("data_path"):
        here["data_path"] = args.data_path
    flags = argparse.Namespace(**{**checkpoint["args"], **here})
    _, loader = build_loaders(flags, device)
    model = build_model(flags, loader.num_classes).to(device, memory_format=torch.channels_last)
    load_states(checkpoint, path, model=model)
    context = functools.partial(autocast, args.precision, device)
    logits, labels = predict(model.eval(), loader, context)
    try:
        return {"epoch": checkpoint["epoch"], **evaluate(logits, labels, trained_exits(flags))}
    except ValueError as e:
        raise UserError(f"{path} cannot be evaluated: {e}") from None
