"""Train and evaluate image classifiers with PS-KD, BYOT and DML: flags in, a run directory out."""

import signal
import sys

if sys.platform == "win32":
    sys.exit("error: Linux and macOS only, because files are locked as POSIX does it; on Windows, use WSL")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is of a job in background
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported ends without a traceback

import argparse
import contextlib
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
import loss
import models
from data import build_transform, check_same_images, load_splits
from loss import METHODS, build_objective, trained_exits
from models import build_model
from utils import distributed, flags
from utils.calibration import calibrate, early_exit_curve
from utils.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, load_states, reading
from utils.compile import CompiledNetwork
from utils.cuda_graph import GraphedStep
from utils.engine import TrainStep, build_optimizer, build_schedule, evaluate, first_nonfinite, predict, train_one_epoch
from utils.errors import (
    Interrupted,
    NonFiniteError,
    UserError,
    describe_error,
    first_line,
    print_error,
    run_command,
    signals_raise,
    tell,
)
from utils.files import write_arrays, write_json
from utils.logger import Logger
from utils.machine import environment, seed_generators, set_up_torch
from utils.records import DataRecord, from_json, results_table, to_json
from utils.run_directory import RunDirectory


def build_parser(fail: Callable | None = None) -> flags.Parser:
    """Every flag, declared by the package that it belongs to."""
    parser = flags.Parser(
        fail,
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


RUNTIME_FLAGS = build_parser().names("runtime", "machine")  # all others define the experiment
PER_MACHINE = build_parser().names("machine")  # in which the processes of one run may differ


def parse_args(
    argv: list[str] | None = None, fail: Callable | None = None, saved: dict | None = None
) -> argparse.Namespace:
    """Read and check the command line; `auto` is resolved.

    A bad value ends the process with status 2, argparse's usage line and one sentence; or calls `fail(message)`,
    which must not return. `saved` are flags of a checkpoint, which hold where the command line does not say otherwise.
    """
    parser = build_parser(fail)
    try:
        distributed.check_environment()
    except ValueError as e:
        parser.exit(2, f"main.py: error: {e}\n")
    args = parser.parse_args(argv, parser.namespace(saved or {}))
    if args.run_name is None:
        args.run_name = "val_only" if args.val_only else default_run_name(args)
    for package in (loss, data, models, flags):
        package.check_flags(args, parser.error)
    return args


def default_args() -> argparse.Namespace:
    """Every flag at its default, unchecked: `auto` stays, and no device is touched."""
    return build_parser().parse_args([])


def default_run_name(args) -> str:
    """`<data>_<model>_<methods>_seed<seed>`."""
    methods = [method for method in METHODS if getattr(args, method)] or ["baseline"]
    return "_".join([args.data_type, args.classifier_type, *methods, f"seed{args.seed}"])


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a user error, printed on one line, 2 wrong flags, 128 + n
    after signal n (130 Ctrl-C, 143 SIGTERM, 129 a closed terminal, 138 SIGUSR1 and 140 SIGUSR2 on Linux)."""
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
                set_up_torch(device, args.precision)
                train(args, device)
        return 0
    except Interrupted as e:
        return 128 + e.number
    except Exception as e:
        message = describe_error(e, args)
        if message is None:
            raise
    if not distributed.is_main():
        distributed.wait_for_rank_0()
        message = f"process {os.environ['RANK']}: {message}"
    print_error(message)
    return status


def train(args, device: torch.device) -> None:
    """Train from the run directory's last checkpoint to --end_epoch, and report."""
    with RunDirectory(Path(args.experiments_dir, args.run_name), vars(args), build_parser().differences) as run:
        # where the run starts: flags are compared before any image is read, images before anything is written
        checkpoint = run.open()
        with reading(run.source):
            record = from_json(DataRecord, checkpoint["data"]) if checkpoint else None
        loaders = load_splits(args, device, record)
        train_loader, val_loader = loaders["train"], loaders["val"]
        check_images(run, record, train_loader.record)
        if run.is_finished:
            run.export("finished")
            tell(f"{run.path} is finished ({args.end_epoch} epochs); --overwrite starts over")
            return

        model, network, step, states = build_training(args, device, train_loader, checkpoint, run.source)
        objective, optimizer, schedule = states["objective"], states["optimizer"], build_schedule(args)

        # from here on files are written
        run.begin(environment(device, distributed.world_size()), to_json(train_loader.record), checkpoint)
        logger = Logger(run.path if run.is_main else None, args.end_epoch)
        first_epoch = len(run.history)
        train_loader.set_epoch(min(first_epoch, args.end_epoch - 1))  # whose images TensorBoard shows
        notes = flags.notes(args, device)
        experiment = {name: value for name, value in vars(args).items() if name not in RUNTIME_FLAGS}
        logger.start(headline(args, device, model, loaders), notes, experiment, train_loader, run.history)

        # training loop
        predictions = None
        for epoch in range(first_epoch, args.end_epoch):
            lr = optimizer.param_groups[0]["lr"] = schedule(epoch)
            seed_generators(args.seed, epoch, distributed.rank())
            network.train()
            objective.train().set_epoch(epoch)
            train_loader.set_epoch(epoch)
            trained = train_one_epoch(step, train_loader, logger.bar)
            distributed.broadcast_buffers(model)  # now, so that all processes find the same number that is not finite
            if bad := first_nonfinite(model, trained["train"]):
                raise NonFiniteError(f"epoch {epoch + 1}: {bad} is not finite")

            start = time.perf_counter()
            predictions = predict(model, val_loader, args.precision)
            if run.is_main:
                settings = {"epoch": epoch, "lr": lr, "alpha_t": objective.alpha_t}
                measured = evaluate(*predictions, trained_exits(args))
                timing = {"seconds_validation": time.perf_counter() - start, "seconds_saving": run.seconds_saving}
                record = {**settings, **trained, **timing, **measured}
                run.save(record, lambda: {name: owner.state_dict() for name, owner in states.items()})
                logger.epoch(record)

        finish(args, run, logger, model, loaders, predictions)


def build_training(args, device: torch.device, train_loader, checkpoint: dict | None, source: Path | None):
    """What is trained and what trains it, in the state of the checkpoint, if there is one; `source` is its file.

    Returns:
        the network; the same as the step calls it, perhaps compiled and in several processes; the step, perhaps
        captured; and by the names of the checkpoint's entries, whatever has a state.
    """
    # network, loss and optimiser
    model = build_model(args, train_loader.num_classes).to(device, memory_format=torch.channels_last)
    objective = build_objective(args, train_loader.num_samples, train_loader.num_classes).to(device)
    optimizer = build_optimizer(args, model)
    states = {"model": model, "objective": objective, "optimizer": optimizer}
    if checkpoint:
        load_states(checkpoint, source, **states)

    # the training step
    network = CompiledNetwork(model) if args.compile else model
    network = distributed.wrap(network, device, args.sync_bn, all_used=all(trained_exits(args)))
    transform = build_transform(args, train_loader.num_classes)
    step = TrainStep(network, objective, optimizer, device, args.precision, args.compile, transform)
    states["scaler"] = step.scaler  # of fp16
    if checkpoint and checkpoint.get("scaler"):
        step.scaler.load_state_dict(checkpoint["scaler"])
    if args.cuda_graph:
        step = GraphedStep(step)
    return model, network, step, states


def check_images(run: RunDirectory, before: DataRecord | None, now: DataRecord) -> None:
    """Raises UserError where the processes read different images, or a run that goes on was trained on others."""
    if distributed.find_differing(vars(now)):
        raise UserError("the processes read different images: give all of them the same data")
    if before:
        check_same_images(before, now, run.source)


def headline(args, device: torch.device, model: torch.nn.Module, loaders: dict) -> str:
    """What is trained, in one line."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    train, val = loaders["train"], loaders["val"]
    images = f"{train.num_samples} training and {val.num_samples} validation images of {train.num_classes} classes"
    if val.record.selects_on_val and "test" not in loaders:
        images += ", no test split"
    machine = environment(device, distributed.world_size())["device_name"]
    network = f"{args.classifier_type} ({millions:.2f} M parameters)"
    return f"{args.run_name}: {network}, {images}, {args.precision} on {machine}"


def finish(args, run: RunDirectory, logger: Logger, model: torch.nn.Module, loaders: dict, predictions) -> None:
    """After the last epoch: predictions, the test split, the report, and the mark that the run is finished.

    predictions: logits (B, M, K) and labels (M,) of the validation images; None where the run had been stopped after
    its last epoch.
    """
    if predictions is None:
        predictions = predict(model, loaders["val"], args.precision)
    test = None
    if loaders["val"].record.selects_on_val:
        test = evaluate_test_split(args, run, model, loaders["val"], loaders.get("test"))
    if not run.is_main:
        return

    logits, labels = predictions
    if args.save_predictions:
        run.check_lock()
        exits = {"exit_logits": logits[:-1]} if len(logits) > 1 else {}
        write_arrays(run.path / "predictions.npz", logits=logits[-1], labels=labels, **exits)
    results = run.results("finished", test)
    logger.finish(results, logits[-1], labels, loaders["val"])
    logger.info(f"{results['seconds_per_epoch']:.2f} s of training per epoch (median); files: {run.path}")
    logger.info(f"evaluate again: {shlex.join(['python', 'main.py', '--val_only', '--resume', str(run.path)])}")
    logger.close()
    run.finish(test)  # last: nothing more is done for a run that is finished


def evaluate_test_split(args, run: RunDirectory, model, val_loader, test_loader) -> dict:
    """The test split's metrics for the last and the best epoch, with temperatures fitted on the validation images;
    complete in rank 0; empty without a test split."""
    trained, test = trained_exits(args), {}
    if test_loader is None:
        return test
    for name, file in (("last", run.path / LAST), ("best", run.path / BEST)):
        # After --resume from another directory, the best epoch's checkpoint may be missing.
        checkpoint = distributed.broadcast_from_rank_0(
            lambda file=file: load_checkpoint(file) if file.exists() else None
        )
        if checkpoint is None:
            continue
        load_states(checkpoint, file, model=model)
        heldout, tested = (predict(model, part, args.precision) for part in (val_loader, test_loader))
        if not run.is_main:
            continue
        epoch = checkpoint["epoch"]
        record = {"epoch": epoch, **evaluate(*tested, trained), **calibrate(heldout, tested, trained)}
        record["early_exit"] = None
        if any(trained):
            costs, backbone = model.multiply_adds(args.image_size, record["temperatures"])
            record["early_exit"] = early_exit_curve(heldout, tested, record["temperatures"], costs, backbone)
        test[name] = record
    return test


def evaluate_runs(args, argv: list[str], device: torch.device) -> None:
    """`--val_only`: evaluate a checkpoint, or the last one of every run under a directory; print, and write val.json.

    Raises:
        UserError: a run could not be evaluated (after all others were).
    """
    path = Path(args.resume)
    is_one = distributed.broadcast_from_rank_0(lambda: path.is_file() or (path / LAST).exists())
    runs = [path]
    if not is_one:
        runs = distributed.broadcast_from_rank_0(lambda: sorted(file.parent for file in path.rglob(LAST)))
    found, failed = {}, []
    for run in runs:
        try:
            found[str(run)] = evaluate_checkpoint(run, argv, device)
        except Exception as e:
            if is_one or distributed.world_size() > 1:  # of several processes, the others may wait for this one
                raise
            failed.append(describe_error(e, args) or f"{run}: {first_line(e)}")
    if found and distributed.is_main():
        for name, record in found.items():
            tell(f"{name}\n{results_table({'last': record})}")
        directory = Path(args.experiments_dir, args.run_name)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "val.json", found[str(path)] if is_one else found)
        tell(f"written to {directory / 'val.json'}")
    if not runs:
        raise UserError(f"{path} holds no checkpoint")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs in {path} could not be evaluated: {'; '.join(failed)}")


def evaluate_checkpoint(path: Path, argv: list[str], device: torch.device) -> dict:
    """The metrics of a checkpoint, with the network, classes, mean and std of its own record; the command line `argv`
    says where and how to compute.

    A run that was selected on validation images is evaluated on those; where the data set at hand has others, which may
    be among those that it was trained on, on the test split.

    Raises:
        UserError: its flags or weights are not valid, a given flag contradicts it, or images are missing or of other
            classes.
    """
    checkpoint, path, note = distributed.broadcast_from_rank_0(lambda: find_checkpoint(path))
    if note and distributed.is_main():
        tell(note)

    def fail(message):
        raise UserError(f"the flags in {path} are not valid here: {message}")

    # the run's flags, to which the command may add where and how to compute
    with reading(path):
        saved, record = checkpoint["args"], from_json(DataRecord, checkpoint["data"])
        experiment = {name: value for name, value in saved.items() if name not in RUNTIME_FLAGS - {"data_path"}}
        own = parse_args(argv, fail, experiment)
        if changes := build_parser().differences(saved, vars(own) | {"precision": saved.get("precision")}):
            raise UserError(f"{path} was trained with other flags: {', '.join(changes)}")
        model = build_model(own, len(record.class_names))
        load_states(checkpoint, path, model=model)

    set_up_torch(device, own.precision)
    model = model.to(device, memory_format=torch.channels_last)
    loaders = load_splits(own, device, record)
    # the images that the run was selected on, unless others lie there now: it may have been trained on some of them
    split = "val"
    if record.selects_on_val:
        found = loaders["val"].record.splits["val"] if "val" in loaders else None
        if found != record.splits["val"]:
            split = "test"
    if split not in loaders:
        raise UserError(f"{own.data_path} has no test split, and other validation images than {path} was selected on")

    # the metrics
    loader = loaders[split]
    if distributed.is_main():
        kind = "validation" if record.selects_on_val and split == "val" else "test"
        tell(f"{path}: {loader.num_samples} {kind} images")
    logits, labels = predict(model, loader, own.precision)
    return {
        "checkpoint": str(path),
        "epoch": checkpoint["epoch"],
        "images": to_json(loader.record.splits[split]),
        "images_of_the_run": to_json(record.splits.get(split)),
        **evaluate(logits, labels, trained_exits(own)),
    }


if __name__ == "__main__":
    run_command(main)
