"""Train and evaluate image classifiers with PS-KD, BYOT and DML: flags in, a run directory out."""

import signal
import sys

if sys.platform == "win32":
    sys.exit("error: Linux and macOS only, because files are locked as POSIX does it; on Windows, use WSL")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is of a job in background
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported ends without a traceback

import argparse
import contextlib
import dataclasses
import os
import shlex
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
import data
import loss
import models
from data import build_transform, check_same_images, load_splits
from loss import METHODS, build_objective
from models import build_model, load_weights
from models.early_exit import multiply_adds
from utils import distributed, flags, launch
from utils.calibration import early_exit_curve, fit_temperatures, scaled_metrics
from utils.checkpoint import BEST, LAST, Checkpoint, find_checkpoint, load_checkpoint, load_states, reading
from utils.compile import Compiled
from utils.cuda_graph import GraphedStep
from utils.engine import TrainStep, build_optimizer, build_schedule, evaluate, first_nonfinite, predict, train_one_epoch
from utils.errors import (
    Interrupted,
    NonFiniteError,
    UserError,
    describe_error,
    print_error,
    run_command,
    signals_raise,
    tell,
)
from utils.files import write_arrays, write_json
from utils.logger import Logger
from utils.machine import environment, seed_generators, set_up_torch
from utils.parser import Parser
from utils.records import Change, EpochRecord, RunRecord, Start, TestRecord, results_table, to_json
from utils.resume import check_flags, check_length
from utils.run_directory import RunDirectory


def build_parser() -> Parser:
    """Every flag, declared by the package that it belongs to."""
    parser = Parser(
        prog="main.py",
        usage="%(prog)s [--PSKD] [--BYOT] [--DML] [--data_type ...] [--classifier_type ...] [more, see --help]",
        description="Train an image classifier with any combination of three losses that need no separate teacher, and "
        "report top-1 and top-5 error, NLL, ECE and AURC. Files go to <experiments_dir>/<run_name>/. The same command "
        "run again continues where it stopped. The paper, which many defaults name: Progressive Self-Knowledge "
        "Distillation with Mutual Learning, 2023.",
        epilog="example: python main.py --BYOT --data_type synthetic --end_epoch 2",  # fits a line
        allow_abbrev=False,
    )
    for package in (loss, data, models, flags):
        package.add_flags(parser)
    return parser


# All others define the experiment; `exits` follows from them.
RUNTIME_FLAGS = build_parser().names("runtime", "machine") | {"exits"}
PER_MACHINE = build_parser().names("machine")  # in which the processes of one run may differ
# Beside --val_only --resume RUN, flags that say where and how to compute; all others are the run's.
OF_EVALUATION = {"data_path", "device", "precision", "workers", "experiments_dir", "run_name", "limit_val"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; `auto` is resolved.

    A bad value ends the process with status 2, argparse's usage line and one sentence.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.val_only:
        for name in parser.given(argv) - OF_EVALUATION - {"val_only", "resume"}:
            parser.error(f"argument --{name}: with --val_only it is the run's own; leave it out")
    if args.run_name is None:
        args.run_name = evaluation_name(args) if args.val_only and args.resume else default_run_name(args)
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


def evaluation_name(args) -> str:
    """`<run>_val`, or for another checkpoint of it than the last `<run>_<checkpoint>_val`."""
    path = Path(args.resume).resolve()
    path = path.parent if path.name == LAST else path
    names = [path.name] if path.is_dir() else [path.parent.name, path.stem]
    return "_".join([*names, "val"])


def experiment_flags(values: dict) -> dict:
    """The flags that define the experiment."""
    return {name: value for name, value in values.items() if name not in RUNTIME_FLAGS}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a user error, printed on one line, 2 wrong flags, 128 + n
    after signal n (130 Ctrl-C, 143 SIGTERM, 129 a closed terminal, 138 SIGUSR1 and 140 SIGUSR2 on Linux)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        launch.WORLD = launch.read_world(os.environ)
    except UserError as e:
        print_error(str(e))
        return 2
    launch.end_with_torchrun()
    args = parse_args(argv)
    try:
        with distributed.process_group(args.device) as device, contextlib.ExitStack() as stack:
            if launch.WORLD.is_main:  # the other processes have nothing to save: signals just end them
                stack.enter_context(signals_raise())
            if differing := distributed.find_differing({k: v for k, v in vars(args).items() if k not in PER_MACHINE}):
                build_parser().error(f"--{differing} differs between the processes: give all of them the same flags")
            given = build_parser().given(argv)
            if args.val_only:
                evaluate_run(args, given, device)
            else:
                set_up_torch(device, args.precision)
                train(args, given, device)
        return 0
    except Interrupted as e:
        return 128 + e.number
    except Exception as e:
        message = describe_error(e, args)
        if message is None:
            raise
    if not launch.WORLD.is_main:
        launch.wait_for_rank_0()
        message = f"process {launch.WORLD.rank}: {message}"
    print_error(message)
    return 1


def train(args, given: set[str], device: torch.device) -> None:
    """Train from the run directory's last checkpoint to --end_epoch, and report.

    given: names of the flags on the command line.
    """
    with RunDirectory(Path(args.experiments_dir, args.run_name), RUNTIME_FLAGS) as directory:
        # where the run starts: flags are compared before any image is read, images before anything is written
        checkpoint, changes = distributed.broadcast_from_rank_0(lambda: find_start(directory, args))
        loaders = load_splits(args, device, checkpoint.run.data if checkpoint else None)
        train_loader, val_loader = loaders["train"], loaders["val"]
        if distributed.find_differing({"images": train_loader.record}):
            raise UserError("the processes read different images: give all of them the same data")
        if checkpoint:
            check_same_images(checkpoint.run.data, train_loader.record, checkpoint.file)
        if distributed.broadcast_from_rank_0(lambda: is_finished(directory.path, checkpoint, args)):
            directory.run = checkpoint.run
            directory.export("finished")
            if launch.WORLD.is_main:
                tell(f"{directory.path} is finished ({args.end_epoch} epochs); --overwrite starts over")
            return

        notes = flags.notes(args, given, device) + loss.notes(args, given)
        model, step, states = build_training(args, device, train_loader, checkpoint)
        if args.weights is not None and checkpoint is None:
            notes.append(f"--weights: {load_weights(model, args.weights)}")
        objective, optimizer, schedule = states["objective"], states["optimizer"], build_schedule(args)
        trained = objective.trained_classifiers(len(model.exits))

        # from here on files are written
        run = begin_run(args, device, checkpoint, changes, train_loader.record, directory.path)
        directory.begin(run, checkpoint)
        logger = Logger(directory.path if launch.WORLD.is_main else None, args.end_epoch)
        first_epoch = len(run.history)
        if checkpoint:
            logger.info(f"continuing from {checkpoint.file}: {first_epoch} of {args.end_epoch} epochs are done")
            before, now = run.starts[-2:]
            if before.device_name != now.device_name:
                logger.info(f"note: they ran on {before.device_name}: rounding differs from an uninterrupted run's")
        logger.start(headline(args, model, loaders, run), notes, run.history)

        # training loop
        predictions = None
        for epoch in range(first_epoch, args.end_epoch):
            predictions = None  # frees the last epoch's, of a gigabyte for large data sets
            lr = optimizer.param_groups[0]["lr"] = schedule(epoch)
            seed_generators(args.seed, epoch, launch.WORLD.rank)
            model.train()
            objective.train().set_epoch(epoch)
            train_loader.set_epoch(epoch)
            measured = train_one_epoch(step, train_loader, logger.bar)
            distributed.broadcast_buffers(model)  # now, so that all processes find the same number that is not finite
            if bad := first_nonfinite(model, measured["train"]):
                raise NonFiniteError(f"epoch {epoch + 1}: {bad} is not finite")

            start = time.perf_counter()
            predictions = predict(model, val_loader, args.precision)
            if launch.WORLD.is_main:
                val = evaluate(*predictions, trained)
                record = EpochRecord(epoch, lr, **measured, val=val, alpha_t=getattr(objective.soften, "alpha_t", None))
                record.seconds_validation = time.perf_counter() - start
                record.seconds_saving = directory.seconds_saving
                directory.save(record, lambda: {name: owner.state_dict() for name, owner in states.items()})
                logger.epoch(record)

        finish(args, directory, logger, model, loaders, predictions)


def find_start(directory: RunDirectory, args) -> tuple[Checkpoint | None, list[Change]]:
    """The checkpoint to start from, None for a new run, and the flags that differ from its and may.

    Raises:
        UserError: the directory or the checkpoint cannot be used, or other flags differ.
    """
    if args.overwrite and args.weights and directory.path.resolve() in (Path(args.weights) / "_").resolve().parents:
        raise UserError(
            f"--overwrite would remove {args.weights}, which --weights begins from: give another --run_name"
        )
    checkpoint = directory.open(args.resume, args.overwrite)
    if checkpoint is None:
        return None, []
    file, before = checkpoint.file, checkpoint.run
    done = len(before.history)
    with reading(file):
        old = experiment_flags(before.args) | {"processes": before.starts[-1].processes}
        new = experiment_flags(vars(args)) | {"processes": launch.WORLD.size}
        changes = check_flags(file, old, new, experiment_flags(vars(default_args())), args.allow_change)
        check_length(file, done, args.end_epoch)
    return checkpoint, [change._replace(epoch=done) for change in changes]


def is_finished(path: Path, checkpoint: Checkpoint | None, args) -> bool:
    """Whether the run in a directory has nothing left to do."""
    if checkpoint is None or checkpoint.file.parent != path:
        return False
    has_predictions = not args.save_predictions or (path / "predictions.npz").exists()
    return checkpoint.run.finished and len(checkpoint.run.history) == args.end_epoch and has_predictions


def begin_run(args, device, checkpoint: Checkpoint | None, changes: list[Change], record, path: Path) -> RunRecord:
    """The record of a run with this start, in a directory, and the epochs of its checkpoint."""
    before = checkpoint.run if checkpoint else RunRecord({}, record)
    start = Start(len(before.history), **environment(device, launch.WORLD.size))
    if checkpoint and checkpoint.file.parent != path:
        start.resumed_from = str(checkpoint.file.absolute())
    return RunRecord(vars(args), record, [*before.starts, start], before.changes + changes, before.history)


def build_training(args, device: torch.device, train_loader, checkpoint: Checkpoint | None):
    """What is trained and what trains it, in the state of the checkpoint, if there is one.

    Returns:
        the network; the training step, perhaps captured, which calls the network perhaps compiled and in several
        processes; and by the names of the checkpoint's entries, whatever has a state.
    """
    # network, loss and optimiser
    model = build_model(args, train_loader.num_classes).to(device, memory_format=torch.channels_last)
    objective = build_objective(args, train_loader.num_samples, train_loader.num_classes).to(device)
    optimizer = build_optimizer(args, model)

    # the training step
    network = Compiled(model) if args.compile else model
    num_exits = len(model.exits)
    all_used = len(objective.trained_classifiers(num_exits)) == num_exits + 1
    network = distributed.wrap(network, device, args.sync_bn, all_used)
    transform = build_transform(args, train_loader.num_classes)
    step = TrainStep(network, objective, optimizer, device, args.precision, args.compile, transform)
    states = {"model": model, "objective": objective, "optimizer": optimizer, "scaler": step.scaler}
    if checkpoint:
        load_states(checkpoint, **states)
    if args.cuda_graph:
        step = GraphedStep(step)
    return model, step, states


def headline(args, model: torch.nn.Module, loaders: dict, run: RunRecord) -> str:
    """What is trained, in one line."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    train, val = loaders["train"], loaders["val"]
    images = f"{train.num_samples} training and {val.num_samples} validation images of {train.num_classes} classes"
    if val.record.selects_on_val and "test" not in loaders:
        images += ", no test split"
    network = f"{args.classifier_type} ({millions:.2f} M parameters)"
    return f"{args.run_name}: {network}, {images}, {args.precision} on {run.starts[-1].device_name}"


def finish(args, directory: RunDirectory, logger: Logger, model: torch.nn.Module, loaders: dict, predictions) -> None:
    """After the last epoch: predictions, the test split, the report, and the mark that the run is finished.

    predictions: logits (B, M, K) and labels (M,) of the validation images; None where the run had been stopped after
    its last epoch.
    """
    if predictions is None:
        predictions = predict(model, loaders["val"], args.precision)
    test = None
    if loaders["val"].record.selects_on_val:
        test = evaluate_chosen(args, directory.path, logger, model, loaders)
    if not launch.WORLD.is_main:
        return

    logits, labels = predictions
    if args.save_predictions:
        directory.check_lock()
        exits = {"exit_logits": logits[:-1]} if len(logits) > 1 else {}
        write_arrays(directory.path / "predictions.npz", logits=logits[-1], labels=labels, **exits)
    logger.finish(dataclasses.replace(directory.run, test=test))
    logger.info(f"evaluate again: {shlex.join(['python', 'main.py', '--val_only', '--resume', str(directory.path)])}")
    logger.close()
    directory.finish(test)  # last: nothing more is done for a run that is finished


def evaluate_chosen(args, path: Path, logger: Logger, model, loaders: dict) -> dict[str, TestRecord]:
    """Of the last and the best epoch, which the held-out images chose: temperatures and early exit, fitted on the same
    images, and the test split's metrics, if there is one. Complete in rank 0."""
    found = {}
    for name, file in (("last", path / LAST), ("best", path / BEST)):
        # After --resume from another directory, the best epoch's checkpoint may be missing.
        checkpoint = distributed.broadcast_from_rank_0(
            lambda file=file: load_checkpoint(file) if file.exists() else None
        )
        if checkpoint is None:
            continue
        load_states(checkpoint, model=model)
        heldout = predict(model, loaders["val"], args.precision)
        test = predict(model, loaders["test"], args.precision) if "test" in loaders else None
        if not launch.WORLD.is_main:
            continue
        trained = checkpoint.run.trained
        fitted = fit_temperatures(*heldout, trained)
        if unbounded := [classifier for classifier, temperature in fitted.items() if temperature is None]:
            logger.info(f"note: {name} epoch: no temperature fits {', '.join(unbounded)} on the held-out images: T = 1")
        record = TestRecord(checkpoint.epoch, {classifier: t or 1.0 for classifier, t in fitted.items()})
        if test is not None:
            record.metrics = evaluate(*test, trained)
            record.calibrated = scaled_metrics(*test, record.temperatures)
        if len(trained) > 1:
            costs, backbone = multiply_adds(model, args.image_size, record.temperatures)
            record.early_exit = early_exit_curve(heldout, test, record.temperatures, costs, backbone)
        found[name] = record
    return found


def evaluate_run(args, given: set[str], device: torch.device) -> None:
    """`--val_only`: evaluate a checkpoint with its own flags, classes, mean and std; print, and write val.json.

    A run that was selected on validation images is evaluated on those; where the data set at hand has others, which may
    be among those that it was trained on, on the test split.

    Args:
        given: the flags of OF_EVALUATION that stand on the command line; the others are the run's.

    Raises:
        UserError: its flags or weights are not valid, or images are missing or of other classes.
    """
    checkpoint, note = distributed.broadcast_from_rank_0(lambda: find_checkpoint(Path(args.resume)))
    file, run = checkpoint.file, checkpoint.run
    if note and launch.WORLD.is_main:
        tell(note)

    def fail(message):
        raise UserError(f"{file} was trained with flags that are not valid here; give another value: {message}")

    own = default_args()
    vars(own).update(run.args, val_only=True, weights=None, device=args.device, workers=args.workers)
    vars(own).update({name: getattr(args, name) for name in given})
    with reading(file):
        for package in (loss, data, models):
            package.check_flags(own, fail)
        flags.check_machine(own, fail)
        set_up_torch(device, own.precision)
        model = build_model(own, len(run.data.class_names))
        load_states(checkpoint, model=model)
        try:
            loaders = load_splits(own, device, run.data)
        except UserError as e:
            raise UserError(f"{e}; the run itself was given --data_path {run.args['data_path']}") from None
    model = model.to(device, memory_format=torch.channels_last)
    # the images that the run was selected on, unless others lie there now: it may have been trained on some of them
    split = "val"
    if run.data.selects_on_val:
        held_out_of = run.data.splits.get("train_and_val")  # None where the images are not training images
        if "val" not in loaders or loaders["val"].record.splits.get("train_and_val") != held_out_of:
            split = "test"
    if split not in loaders:
        raise UserError(f"{own.data_path} has no test split, and other validation images than {file} was selected on")

    # the metrics
    loader = loaders[split]
    found = loader.record.splits[split]
    if found == run.data.splits.get("val"):  # also where they lie by themselves, as a test split would
        split = "val"
    if launch.WORLD.is_main:
        kind = "validation" if run.data.selects_on_val and split == "val" else "test"
        tell(f"{file}: {loader.num_samples} {kind} images")
    classifiers = evaluate(*predict(model, loader, own.precision), run.trained)
    if not launch.WORLD.is_main:
        return
    tell(results_table({f"epoch {checkpoint.epoch + 1}": classifiers}))
    images = {"images": found, "images_of_the_run": run.data.splits.get(split)}
    output = Path(args.experiments_dir, args.run_name, "val.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, to_json({"checkpoint": str(file), "epoch": checkpoint.epoch, **images, split: classifiers}))
    tell(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
