"""Train and evaluate image classifiers with PS-KD, BYOT and DML: flags in, a run directory out."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported ends without a traceback

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
import loss
import models
from data import build_loaders
from loss import METHODS, build_objective, trained_exits
from models import build_model
from utils import distributed, flags
from utils.calibration import calibrate, early_exit_curve
from utils.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, load_states
from utils.cuda_graph import GraphedStep
from utils.engine import TrainStep, build_optimizer, build_schedule, evaluate, find_not_finite, predict, train_one_epoch
from utils.errors import Interrupted, UserError, describe_error, first_line, signals_raise
from utils.files import write_arrays, write_json
from utils.logger import Logger
from utils.machine import machine_facts, set_up_torch
from utils.metrics import NonFiniteError
from utils.records import results_table
from utils.run_directory import RunDirectory

PER_MACHINE = ("data_path", "workers", "experiments_dir")  # flags in which the processes of one run may differ


def build_parser() -> argparse.ArgumentParser:
    """Every flag, declared by the package that it belongs to."""
    parser = flags.Parser(
        prog="main.py",
        usage="%(prog)s [--PSKD] [--BYOT] [--DML] [--data_type ...] [--classifier_type ...] [more, see --help]",
        description="Train an image classifier with any combination of three teacher-free losses and report top-1 "
        "and top-5 error, NLL, ECE and AURC. Files go to <experiments_dir>/<run_name>/. The same command run again "
        "continues where it stopped.",
        epilog="example: python main.py --PSKD --BYOT --DML --data_type synthetic --end_epoch 2",
        allow_abbrev=False,
    )
    for package in (loss, data, models, flags):
        package.add_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None, fail: Callable | None = None) -> argparse.Namespace:
    """Read and check the command line; `auto` is resolved.

    A bad value ends the process with status 2, argparse's usage line and one sentence; or calls `fail(message)`,
    which must not return.
    """
    parser = build_parser()
    parser.error = fail or parser.error
    try:
        distributed.check_environment()
    except ValueError as e:
        parser.exit(2, f"main.py: error: {e}\n")
    args = parser.parse_args(argv)
    if args.run_name is None:
        args.run_name = "val_only" if args.val_only else default_run_name(args)
    for package in (loss, data, models, flags):
        package.check_flags(args, parser.error)
    return args


def default_run_name(args) -> str:
    """`<data>_<model>_<methods>_seed<seed>`."""
    methods = [method for method in METHODS if getattr(args, method)] or ["baseline"]
    return "_".join([args.data_type, args.classifier_type, *methods, f"seed{args.seed}"])


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a user error, printed on one line, 2 wrong flags, 128 + n
    after signal n (130 Ctrl-C, 143 SIGTERM, 129 a closed terminal)."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    status = 1
    try:
        with distributed.process_group(args.device) as device, contextlib.ExitStack() as stack:
            if distributed.is_main():  # the other processes have nothing to save: signals just end them
                stack.enter_context(signals_raise())
            if differing := distributed.find_differing({k: v for k, v in vars(args).items() if k not in PER_MACHINE}):
                status = 2
                raise UserError(f"--{differing} differs between the processes: give all of them the same flags")
            if args.val_only:
                evaluate_runs(args, argv, device)
            else:
                set_up_torch(args.seed, device, args.precision)
                train(args, device)
        return 0
    except Interrupted as e:
        return 128 + e.number
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        message = describe_error(e, args)
        if message is None:
            raise
    if not distributed.is_main():
        distributed.wait_for_rank_0()
        message = f"process {os.environ['RANK']}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def train(args, device: torch.device) -> None:
    """Train from the run directory's last checkpoint to --end_epoch, and report."""
    with RunDirectory(Path(args.experiments_dir, args.run_name), vars(args)) as run:
        checkpoint = run.open()
        if run.is_finished:
            return
        train_loader, val_loader = build_loaders(args, device)
        model = build_model(args, train_loader.num_classes).to(device, memory_format=torch.channels_last)
        objective = build_objective(args, train_loader.num_samples, train_loader.num_classes).to(device)
        optimizer, schedule = build_optimizer(args, model), build_schedule(args)
        states = {"model": model, "objective": objective, "optimizer": optimizer}
        history = []
        if checkpoint:
            history = checkpoint["history"]
            load_states(checkpoint, run.source, **states)
        network = distributed.wrap(model, device, args.sync_bn, all_used=all(trained_exits(args)))
        step = TrainStep(network, objective, optimizer, device, args.precision, args.compile)
        if args.cuda_graph:
            step = GraphedStep(step)
        facts = machine_facts(device, distributed.world_size())
        run.begin({**facts, "data": train_loader.describe()}, history)
        logger = Logger(run.path if run.is_main else None, args.end_epoch)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        logger.info(
            f"{args.run_name}: {args.classifier_type} ({millions:.2f} M parameters), {train_loader.num_samples}"
            f" training and {val_loader.num_samples} validation images, {args.precision} on {facts['device_name']}"
        )
        for note in flags.notes(args, device):
            logger.info(f"note: {note}")
        train_loader.set_epoch(min(len(history), args.end_epoch - 1))
        logger.start(vars(args), train_loader, history)

        logits = labels = None
        for epoch in range(len(history), args.end_epoch):
            lr = optimizer.param_groups[0]["lr"] = schedule(epoch)
            network.train()
            objective.train().set_epoch(epoch)
            train_loader.set_epoch(epoch)
            trained = train_one_epoch(step, train_loader, logger.bar)
            distributed.broadcast_buffers(model)  # first, so that every process finds the same
            if bad := find_not_finite(model, trained["train"]):
                raise not_finite(bad, epoch, args)
            start = time.perf_counter()
            logits, labels = predict(model, val_loader, args.precision)
            if run.is_main:
                measured = measure(logits, labels, epoch, args)
                timing = {"seconds_validation": time.perf_counter() - start, "seconds_saving": run.seconds_saving}
                settings = {"epoch": epoch, "lr": lr, "alpha_t": objective.alpha_t}
                history.append({**settings, **trained, **timing, **measured})
                run.save(lambda: {name: owner.state_dict() for name, owner in states.items()}, history)
                logger.epoch(history[-1])

        if logits is None:  # the run had been stopped after its last epoch
            logits, labels = predict(model, val_loader, args.precision)
        test = None
        if args.val_split is not None:
            test = evaluate_test_split(args, device, run, model, val_loader)
        if run.is_main:
            if args.save_predictions:
                run.check_lock()
                exits = {"exit_logits": logits[:-1]} if len(logits) > 1 else {}
                write_arrays(run.path / "predictions.npz", logits=logits[-1], labels=labels, **exits)
            results = run.write_records(history, "running", test)
            logger.finish(results, logits[-1], labels, val_loader)
            logger.info(f"{results['seconds_per_epoch']:.2f} s of training per epoch (median); files: {run.path}")
            logger.info(f"evaluate again: {shlex.join(['python', 'main.py', '--val_only', '--resume', str(run.path)])}")
            logger.close()
            run.write_records(history, "finished", test)  # last: nothing more is done for a run with that status


def measure(logits: torch.Tensor, labels: torch.Tensor, epoch: int, args) -> dict:
    """`evaluate`, with an error for the user where a logit is not finite."""
    try:
        return evaluate(logits, labels, trained_exits(args))
    except NonFiniteError:
        raise not_finite("a logit", epoch, args) from None


def not_finite(what: str, epoch: int, args) -> UserError:
    """The error that stops a run: what is not finite since which epoch, and what to try."""
    remedy = "a lower --lr, more steps per epoch" + ("" if args.precision == "fp32" else " or --precision fp32")
    return UserError(
        f"epoch {epoch + 1}: {what} is not finite (NaN or infinite); earlier checkpoints are kept; try {remedy}"
    )


def evaluate_test_split(args, device, run: RunDirectory, model, val_loader) -> dict:
    """The test split's metrics for the last and the best epoch, with temperatures fitted on the held-out images;
    complete in rank 0."""
    loader = build_loaders(args, device, split="test")
    trained, test = trained_exits(args), {}
    for name, file in (("last", run.path / LAST), ("best", run.path / BEST)):
        # After --resume from another directory, the best epoch's checkpoint may be missing.
        checkpoint = distributed.from_main(lambda file=file: load_checkpoint(file) if file.exists() else None)
        if checkpoint is None:
            continue
        load_states(checkpoint, file, model=model)
        heldout, tested = (predict(model, part, args.precision) for part in (val_loader, loader))
        if not run.is_main:
            continue
        epoch = checkpoint["epoch"]
        record = {"epoch": epoch, **measure(*tested, epoch, args), **calibrate(heldout, tested, trained)}
        record["early_exit"] = None
        if any(trained):
            model.temperatures = record["temperatures"]
            costs, backbone = model.multiply_adds(args.image_size)
            record["early_exit"] = early_exit_curve(heldout, tested, record["temperatures"], costs, backbone)
        test[name] = record
    return test


def evaluate_runs(args, argv: list[str], device: torch.device) -> None:
    """`--val_only`: evaluate a checkpoint, or the last one of every run under a directory; print, and write val.json.

    Raises:
        UserError: a run could not be evaluated (after all others were).
    """
    path = Path(args.resume)
    is_one = distributed.from_main(lambda: path.is_file() or (path / LAST).exists())
    runs = [path] if is_one else distributed.from_main(lambda: sorted(file.parent for file in path.rglob(LAST)))
    found, failed = {}, []
    for run in runs:
        try:
            found[str(run)] = evaluate_checkpoint(run, argv, device)
        except (UserError, OSError, MemoryError, RuntimeError) as e:
            if is_one or distributed.world_size() > 1:  # of several processes, the others may wait for this one
                raise
            failed.append(describe_error(e, args) or f"{run}: {first_line(e)}")
    if found and distributed.is_main():
        for name, record in found.items():
            print(name, results_table({"last": record}), sep="\n")
        directory = Path(args.experiments_dir, args.run_name)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "val.json", found[str(path)] if is_one else found)
        print(f"written to {directory / 'val.json'}")
    if not runs:
        raise UserError(f"{path} holds no checkpoint")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs in {path} could not be evaluated: {'; '.join(failed)}")


def evaluate_checkpoint(path: Path, argv: list[str], device: torch.device) -> dict:
    """The metrics of a checkpoint, with the network and the images of its own flags; the command line `argv` says
    where and how to compute.

    Raises:
        UserError: its flags or weights are not valid, a given flag contradicts it, or images are missing.
    """
    checkpoint, path, note = distributed.from_main(lambda: find_checkpoint(path))
    if note and distributed.is_main():
        print(note)

    def fail(message):
        raise UserError(f"the flags in {path} are not valid here: {message}")

    saved = checkpoint["args"]
    experiment = {name: value for name, value in saved.items() if name not in flags.RUNTIME_FLAGS - {"data_path"}}
    own = parse_args([*flags.to_argv(experiment), *argv], fail)  # of a flag that is given twice, the last one counts
    if changes := flags.differences(saved, vars(own) | {"precision": saved.get("precision")}):
        raise UserError(f"{path} was trained with other flags: {', '.join(changes)}")
    set_up_torch(own.seed, device, own.precision)
    loader = build_loaders(own, device, split="val")
    if distributed.is_main():
        print(f"{path}: {loader.num_samples} {'test' if own.val_split is None else 'held-out training'} images")
    model = build_model(own, loader.num_classes).to(device, memory_format=torch.channels_last)
    load_states(checkpoint, path, model=model)
    logits, labels = predict(model, loader, own.precision)
    return {"checkpoint": str(path), "epoch": checkpoint["epoch"], **measure(logits, labels, checkpoint["epoch"], own)}


if __name__ == "__main__":
    exit_status = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # a pager that was left: Python, too, flushes at its end, and would complain
    sys.exit(exit_status)
