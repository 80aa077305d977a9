"""Train and evaluate image classifiers with PS-KD, BYOT and DML: flags in, a run directory out."""

import argparse
import contextlib
import functools
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from data import DATASETS, build_loaders
from loss import build_objective, trained_exits
from models import ALIASES, MODELS, build_model, min_width
from utils import distributed
from utils.checkpoint import load_checkpoint, write_arrays, write_json
from utils.cuda_graph import GraphedStep
from utils.engine import Meter, evaluate, find_not_finite, learning_rate, predict, train_one_epoch, train_step
from utils.errors import UserError
from utils.interrupt import Interrupted, signals_raise
from utils.logger import Logger, results_table
from utils.machine import describe_machine, has_bf16_instructions
from utils.run_directory import BEST, LAST, RunDirectory, best_record, differences, find_checkpoint
from utils.seed import set_up_torch

METHODS = ("PSKD", "BYOT", "DML")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; `auto` comes back resolved.

    A bad value ends the process with status 2, argparse's usage line and one sentence.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _parser() -> argparse.ArgumentParser:
    """Every flag with its default and its reason."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="%(prog)s [--PSKD] [--BYOT] [--DML] [--data_type ...] [--classifier_type ...] [more, see --help]",
        description="Train an image classifier with any combination of three teacher-free losses and report top-1 "
        "and top-5 error, NLL, ECE and AURC. Files go to <experiments_dir>/<run_name>/. The same command given "
        "again goes on where it stopped.",
        epilog="example: python main.py --PSKD --BYOT --DML --data_type synthetic --end_epoch 2",
        allow_abbrev=False,
    )

    group = parser.add_argument_group("methods (all off: the baseline)")
    flag = functools.partial(group.add_argument, action="store_true")
    flag("--PSKD", help="soften labels with the last epoch's own predictions")
    flag("--BYOT", help="let the final classifier teach the exits (paper, eq. 2)")
    flag("--DML", help="let exits and final feature learn from each other (paper, eq. 3)")
    number = functools.partial(_add_number, group)
    number("--alpha_T", float, 0.8, 0, 1, "PS-KD: weight of the past in the last epoch", "PS-KD's own value")
    number("--alpha", float, 0.1, 0, 1, "BYOT: weight of the teacher against the label", "paper")
    number("--temperature", float, 3.0, 0.01, 1000, "BYOT: tau", "published script")
    number(
        "--beta",
        float,
        1e-6,
        0,
        1000,
        "BYOT: weight of the hint, a sum over the batch: its weight grows with --batch_size",
        "paper",
    )
    number("--BYOT_from_k_block", int, 1, 1, 3, "BYOT: shallowest exit that is taught", "paper, Table 3")
    flag("--DML_on_output", help="DML: compare logits in place of features")
    flag("--DML_as_published", help="DML: the published script's value, which has no gradient")

    group = parser.add_argument_group("data")
    number = functools.partial(_add_number, group)
    group.add_argument(
        "--data_type",
        choices=list(DATASETS),
        default="cifar100",
        metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: %(default)s, the paper's; synthetic needs no download)",
    )
    group.add_argument(
        "--data_path",
        default="./datasets",
        metavar="DIR",
        help="where data sets lie or are downloaded to (default: %(default)s)",
    )
    number(
        "--image_size",
        int,
        None,
        16,
        512,
        "pixels, a multiple of 8; images of another size are resized",
        "32 for every data set, as in the paper",
    )
    number("--workers", int, 8, 0, 1024, "processes that decode image files, once", "training needs none")
    number("--classes", int, None, 2, 10**6, "use only the first N classes", "all")
    number(
        "--limit_train",
        int,
        None,
        1,
        10**9,
        "use only N training images, the first of each class, after --val_split",
        "all",
    )
    number("--limit_val", int, None, 1, 10**9, "the same for the validation images and for the test split", "all")
    number(
        "--val_split",
        float,
        None,
        0.001,
        0.9,
        "hold out this part of the training images and select on it",
        "none: as in the paper, the test images are the validation images",
    )

    group = parser.add_argument_group("model")
    number = functools.partial(_add_number, group)
    group.add_argument(
        "--classifier_type",
        choices=[*MODELS, *ALIASES],
        default="resnet18",
        metavar="NAME",
        help=f"one of {', '.join([*MODELS, *ALIASES])} (default: %(default)s, the paper's first; "
        "the last two are the published script's names)",
    )
    number("--num_resnet_blocks", int, 4, 1, 4, "stages of the backbone, one exit on each but the last", "paper")
    number("--width", int, 64, 1, 1024, "channels of the first stage; small values make quick tests", "paper")

    group = parser.add_argument_group("optimisation (SGD, Nesterov momentum 0.9)")
    number = functools.partial(_add_number, group)
    number("--end_epoch", int, 300, 1, 100_000, "epochs T", "paper")
    number("--batch_size", int, 128, 1, 1_000_000, "images in a step, over all processes", "paper")
    number("--lr", float, 0.1, 1e-12, 1000, "learning rate", "paper")
    number("--lr_decay_rate", float, 0.1, 1e-12, 1, "factor at each epoch of the schedule", "paper")
    group.add_argument(
        "--lr_decay_schedule",
        type=_number(int, 1, 10**9),
        nargs="*",
        default=[150, 225],
        metavar="EPOCH",
        help="epochs, ascending, at which the rate drops (default: 150 225, paper)",
    )
    number("--weight_decay", float, 5e-4, 0, 1, "on every parameter", "published script")
    number("--seed", int, 4, 0, 2**32 - 1, "of weights, order and augmentation", "published script")

    group = parser.add_argument_group("run")
    number = functools.partial(_add_number, group)
    group.add_argument(
        "--experiments_dir",
        default="experiments",
        metavar="DIR",
        help="where run directories go (default: %(default)s)",
    )
    group.add_argument("--run_name", metavar="NAME", help="(default: <data>_<model>_<methods>_seed<seed>)")
    group.add_argument(
        "--resume", metavar="PATH", help="go on from this checkpoint or run directory; its flags must be given again"
    )
    flag = functools.partial(group.add_argument, action="store_true")
    flag("--val_only", help="with --resume: evaluate the checkpoint, or every run under a directory, and stop")
    flag("--overwrite", help="start anew in a run directory that is in use")
    flag("--allow_end_epoch_change", help="let --end_epoch differ on resume, though PS-KD's alpha_t depends on it")
    flag("--save_predictions", help="keep the last epoch's validation logits in predictions.npz")
    number(
        "--saveckp_freq",
        int,
        0,
        0,
        10**9,
        "also keep a checkpoint every N epochs",
        "only last, previous and best are kept",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="auto is bf16 on a processor that has it, else fp32; losses, memory and metrics are "
        "float32 or better in all (default: %(default)s)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile the network and, on one GPU, capture the step as a CUDA graph (default: off)",
    )
    flag("--sync_bn", help="BatchNorm over all processes' images (GPUs only)")

    if not distributed.is_first_here():  # what is wrong with flags or machine is wrong for all of its processes
        parser.error = lambda message: parser.exit(2, distributed.let_another_speak())
    return parser


def _number(kind: type, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            word = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {word} from {low:g} to {high:g}")
        return value

    return convert


def _add_number(group, flag: str, kind: type, default, low, high, what: str, why: str) -> None:
    """Add a flag for a number from `low` to `high`; `why` is the default's reason or source."""
    shown = "" if default is None else f"{default:g}, "
    metavar = "N" if kind is int else "X"
    text = f"{what} (default: {shown}{why})"
    group.add_argument(flag, type=_number(kind, low, high), default=default, metavar=metavar, help=text)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The checks that concern several flags or this machine; resolves what is left to `auto`."""
    fail = parser.error
    args.classifier_type = ALIASES.get(args.classifier_type, args.classifier_type)
    if sorted(set(args.lr_decay_schedule)) != args.lr_decay_schedule:
        fail(f"argument --lr_decay_schedule: {args.lr_decay_schedule} must ascend")
    for off, on in (("DML_on_output", "DML"), ("DML_as_published", "DML"), ("val_only", "resume")):
        if getattr(args, off) and not getattr(args, on):
            fail(f"argument --{off}: has no effect without --{on}")
    for a, b in (("DML_on_output", "DML_as_published"), ("overwrite", "resume")):
        if getattr(args, a) and getattr(args, b):
            fail(f"argument --{a}: cannot be used with --{b}")

    exits = args.num_resnet_blocks - 1
    if args.BYOT or args.DML:
        if not exits:
            fail("argument --num_resnet_blocks: 1 block has no exit for --BYOT or --DML; give 2 to 4")
        if args.BYOT and args.BYOT_from_k_block > exits:
            fail(
                f"argument --BYOT_from_k_block: {args.BYOT_from_k_block} is beyond the last exit; "
                f"{args.num_resnet_blocks} blocks have exits 1 to {exits}"
            )
    narrowest = min_width(args.classifier_type, args.num_resnet_blocks, args.BYOT or args.DML)
    if args.width < narrowest:
        fail(
            f"argument --width: {args.width} leaves a layer without channels; {args.classifier_type} needs "
            f"at least {narrowest}"
        )

    dataset = DATASETS[args.data_type]
    args.image_size = args.image_size or dataset.image_size
    if args.image_size % 8:
        fail(f"argument --image_size: {args.image_size} is not a multiple of 8")
    if args.classes is not None and args.classes > dataset.num_classes:
        fail(f"argument --classes: {args.classes} is more than the {dataset.num_classes} of {args.data_type}")

    _check_machine(fail, args)
    _check_paths(fail, args)


def _check_machine(fail, args: argparse.Namespace) -> None:
    """Device, precision and number of processes."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(args.device)
        if device.type == "cuda" and 0 < torch.cuda.device_count() < distributed.num_local():
            fail(f"argument --device: {distributed.num_local()} processes for {torch.cuda.device_count()} GPUs")
        if device.type not in ("cpu", "cuda"):
            raise ValueError
        torch.zeros(1, dtype=torch.float64, device=device)
    except Exception:  # an unknown name, a missing driver, a number too high: each has its own exception
        fail(
            f"argument --device: {args.device!r} cannot be used here; this machine has "
            + ("cpu" if not torch.cuda.is_available() else f"cpu and cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        )
    on_gpu = device.type == "cuda"
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_bf16_instructions()
    if args.precision == "auto":
        args.precision = "bf16" if bf16 else "fp32"
    if args.precision == "tf32" and not on_gpu:
        fail("argument --precision: tf32 needs an NVIDIA GPU; a CPU has fp32 and bf16")
    if args.precision == "bf16" and on_gpu and not bf16:
        fail("argument --precision: this GPU has no bf16; give fp32")
    if args.sync_bn and not on_gpu:
        fail("argument --sync_bn: needs GPUs; on a CPU BatchNorm is per process")
    processes = distributed.num_launched()
    if args.batch_size % processes:
        below = args.batch_size // processes * processes
        near = f"{below} or {below + processes}" if below else str(processes)
        fail(
            f"argument --batch_size: {args.batch_size} cannot be split evenly among {processes} processes; give {near}"
        )


def _check_paths(fail, args: argparse.Namespace) -> None:
    """Names and places of files."""
    if args.run_name is None:
        methods = "_".join(m for m in METHODS if getattr(args, m)) or "baseline"
        args.run_name = f"{args.data_type}_{args.classifier_type}_{methods}_seed{args.seed}"
    for name in ("run_name", "experiments_dir", "data_path", "resume"):
        value = getattr(args, name) or ""
        if not value.isprintable():  # control characters, or bytes that are no UTF-8, which TensorBoard cannot take
            fail(f"argument --{name}: {value!r} has characters that cannot be printed")
    parts = Path(args.run_name).parts
    if not parts or Path(args.run_name).is_absolute() or ".." in parts:
        fail(f"argument --run_name: {args.run_name!r} must be a name below --experiments_dir")
    if max(len(os.fsencode(part)) for part in parts) > 255:
        fail(f"argument --run_name: {args.run_name[:20]!r}... is longer than the 255 bytes that a name may have")
    for name in ("experiments_dir", "data_path"):
        value = getattr(args, name)
        place = Path(value).absolute()
        if not value or not os.path.isdir(next(filter(os.path.exists, (place, *place.parents)))):
            fail(f"argument --{name}: {value!r} is not a directory")
    if args.resume is not None and not os.path.exists(args.resume):
        fail(f"argument --resume: {args.resume!r} does not exist; give a checkpoint or a run directory")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 an error that its one line names, 130 or 143 stopped
    by SIGINT or SIGTERM."""
    args = parse_args(argv)
    args.overwrite = args.overwrite and not distributed.is_restart()  # or a restart would lose what is kept
    try:
        with signals_raise(), distributed.processes(args.device) as device:
            set_up_torch(args.seed, device, args.precision)
            (validate_only if args.val_only else train)(args, device)
        return 0
    except Interrupted as e:
        return 128 + e.number
    except UserError as e:
        message = str(e)
    except OSError as e:
        where = e.filename or Path(args.experiments_dir, args.run_name)
        if isinstance(e, BrokenPipeError):
            where = "standard output"
        message = f"{where}: {e.strerror or e}; mend it and give the same command"
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(e):
            message = (
                f"out of memory with --batch_size {args.batch_size} on {args.device}: lower --batch_size,"
                " --image_size or --width, or give --precision bf16"
            )
        elif type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = next(line for line in str(e).splitlines() if line.strip())
            message = f"--compile does not work here ({reason[:200]}); give the same command without it"
        else:
            raise
    if not distributed.is_main():
        distributed.let_another_speak()
        message = f"process {os.environ['RANK']}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Hold the run directory, train, and leave results.json with the right status whatever happens."""
    run = None  # but in the main process, which alone writes

    def start() -> dict | None:
        nonlocal run
        run = RunDirectory(Path(args.experiments_dir, args.run_name))
        return run.starting_point(vars(args), say=print)

    try:
        checkpoint = distributed.from_main(start)
        if checkpoint and distributed.from_main(lambda: nothing_left(args, run, checkpoint)):
            if run:
                print(f"{run.path} is finished ({args.end_epoch} epochs); --overwrite starts anew")
            return
        run_epochs(args, device, run, checkpoint)
    except BaseException as e:
        if run:
            run.set_status("interrupted" if isinstance(e, Interrupted) else "failed")
            if isinstance(e, Interrupted):
                again = "the same command" + (" without --overwrite" if args.overwrite else "")
                what = f"no epoch was done; {again} starts anew"
                if run.num_kept:
                    epochs = "1 epoch is" if run.num_kept == 1 else f"{run.num_kept} epochs are"
                    what = f"{epochs} kept in {run.path / LAST}; {again} goes on from there"
                print(f"\ninterrupted: {what}", file=sys.stderr, flush=True)
        raise
    finally:
        if run:
            run.close()


def nothing_left(args, run: RunDirectory, checkpoint: dict) -> bool:
    """Whether the run is finished and has every file that is asked for."""
    wanted = args.save_predictions and not (run.path / "predictions.npz").exists()
    return checkpoint["epoch"] + 1 == args.end_epoch and run.is_finished(args.end_epoch) and not wanted


def run_epochs(args, device: torch.device, run: RunDirectory | None, checkpoint: dict | None) -> None:
    """Build everything, train from where the checkpoint stands to --end_epoch, report. `run` is None in all
    processes but the main one, which alone writes."""
    train_loader, val_loader = build_loaders(args, device)
    model = build_model(args, train_loader.num_classes).to(device, memory_format=torch.channels_last)
    objective = build_objective(args, train_loader.num_samples, train_loader.num_classes).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    history = []
    if checkpoint:
        history = checkpoint["history"]
        load_states(checkpoint, (run and run.source) or LAST, model=model, optimizer=optimizer, objective=objective)
    network = distributed.wrap(model, device, args.sync_bn, all_used=all(trained_exits(args)))
    step = train_step
    if args.compile:
        network = torch.compile(network, dynamic=False)  # two shapes: the whole batch and the last one
        if device.type == "cuda" and distributed.world_size() == 1:
            step = GraphedStep()
    if run:
        run.begin({**vars(args), **describe_machine(device)}, history, args.overwrite)
    logger = Logger(run and run.path, args.end_epoch)
    logger.say(describe(args, device, model, train_loader, val_loader))
    for note in notes(args, device):
        logger.say(f"note: {note}")
    for record in history:
        logger.epoch(record)
    train_loader.set_epoch(min(len(history), args.end_epoch - 1))
    logger.start(vars(args), train_loader)

    context = functools.partial(autocast, args.precision, device)
    meter = Meter(device)
    logits = labels = None
    for epoch in range(len(history), args.end_epoch):
        start = time.perf_counter()
        lr = learning_rate(args.lr, args.lr_decay_rate, args.lr_decay_schedule, epoch)
        optimizer.param_groups[0]["lr"] = lr
        network.train()
        objective.train().set_epoch(epoch)
        train_loader.set_epoch(epoch)
        trained = train_one_epoch(network, objective, optimizer, train_loader, context, meter, step, logger.bar(epoch))
        distributed.broadcast_buffers(model)  # first, so that every process finds the same
        stop_if_not_finite(find_not_finite(model, trained["train"]), epoch, args)
        logits, labels = predict(model.eval(), val_loader, context)
        if not run:
            continue
        record = {"epoch": epoch, "lr": lr, "alpha_t": objective.alpha_t, **trained}
        history.append(record | evaluate_or_stop(logits, labels, args, epoch))
        if args.save_predictions and epoch == args.end_epoch - 1:
            write_arrays(run.path / "predictions.npz", logits=logits[-1], labels=labels)
        states = {"model": model, "optimizer": optimizer, "objective": objective}
        run.save(
            {name: owner.state_dict() for name, owner in states.items()}
            | {"epoch": epoch, "history": history, "args": vars(args)},
            is_best=best_record(history)["epoch"] == epoch,
            keep=args.saveckp_freq > 0 and (epoch + 1) % args.saveckp_freq == 0,
        )
        run.write_records(history, "running")
        logger.epoch(history[-1], time.perf_counter() - start)

    if logits is None:  # nothing was left to train: the run had been stopped after its last epoch
        logits, labels = predict(model.eval(), val_loader, context)
        if run and args.save_predictions:
            write_arrays(run.path / "predictions.npz", logits=logits[-1], labels=labels)
    test = evaluate_test_split(args, device, run, model, history) if args.val_split is not None else None
    if run:
        results = run.write_records(history, "running", test)
        logger.finish(vars(args), results, logits[-1], labels, val_loader)
        name = describe_machine(device)["device_name"]
        logger.say(f"{results['seconds_per_epoch']:.2f} s of training an epoch (median) on {name}")
        logger.say(f"files: {run.path}")
        logger.say(f"evaluate again: {evaluation_command(args, run.path)}")
    logger.close()
    if run:
        run.write_records(history, "finished", test)  # at last: nothing more is done for a run that says so


def load_states(checkpoint: dict, source, **owners) -> None:
    """Load the owners' states from the checkpoint's entries of the same names.

    Raises:
        UserError: the states are another network's.
    """
    for name, owner in owners.items():
        try:
            owner.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            reason = str(e).strip().splitlines()[-1].strip()
            raise UserError(f"{source} does not fit: its {name} is of another run ({reason})") from None


def stop_if_not_finite(what: str | None, epoch: int, args) -> None:
    """Raises UserError, with what is kept and what to try, where `what` names something that is not finite."""
    if what:
        kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "no epoch was finished"
        remedy = "a lower --lr, more steps an epoch" + ("" if args.precision == "fp32" else " or --precision fp32")
        raise UserError(f"epoch {epoch + 1}: {what} is not finite (NaN or infinite); {kept}; try {remedy}")


def evaluate_or_stop(logits, labels, args, epoch: int) -> dict:
    try:
        return evaluate(logits, labels, trained_exits(args))
    except ValueError:
        stop_if_not_finite("a validation logit", epoch, args)
        raise


def evaluate_test_split(args, device, run: RunDirectory | None, model, history: list[dict]) -> dict | None:
    """The test split's metrics for the last and for the best epoch, in the main process."""
    loader = build_loaders(args, device, split="test")
    context = functools.partial(autocast, args.precision, device)
    # The best epoch may lie before a checkpoint of another directory that the run went on from, and be gone.
    best = distributed.from_main(lambda: load_checkpoint(run.path / BEST) if (run.path / BEST).exists() else None)
    test = {}
    for name in ("last", "best") if best else ("last",):
        if name == "best":
            load_states(best, BEST, model=model)
        logits, labels = predict(model.eval(), loader, context)
        if run:
            epoch = (history[-1] if name == "last" else best_record(history))["epoch"]
            test[name] = {"epoch": epoch, **evaluate_or_stop(logits, labels, args, epoch)}
    return test


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
    parser = _parser()
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
    """The epoch and the metrics of a checkpoint, with the network and the images of its own flags."""
    checkpoint = load_checkpoint(path)
    here = {"workers": args.workers}
    if args.data_path != _parser().get_default("data_path"):
        here["data_path"] = args.data_path
    flags = argparse.Namespace(**{**checkpoint["args"], **here})
    _, loader = build_loaders(flags, device)
    model = build_model(flags, loader.num_classes).to(device, memory_format=torch.channels_last)
    load_states(checkpoint, path, model=model)
    context = functools.partial(autocast, args.precision, device)
    logits, labels = predict(model.eval(), loader, context)
    epoch = checkpoint["epoch"]
    return {"epoch": epoch, **evaluate_or_stop(logits, labels, flags, epoch)}


def autocast(precision: str, device: torch.device):
    """The context in which the network computes. No cache of casts: it would outlive a captured step."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def notes(args, device: torch.device) -> list[str]:
    """What a user may not have meant, though it is allowed."""
    found = []
    if not any(epoch < args.end_epoch for epoch in args.lr_decay_schedule):
        schedule = " ".join(map(str, args.lr_decay_schedule)) or "empty"
        found.append(f"the learning rate never drops: --lr_decay_schedule is {schedule}, --end_epoch {args.end_epoch}")
    if args.precision == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        found.append("--precision bf16 is slow here: this processor has no bf16 instructions; fp32 is faster")
    return found


def describe(args, device, model, train_loader, val_loader) -> str:
    """One line: what will be trained on what."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    methods = " + ".join(m for m in METHODS if getattr(args, m)) or "baseline"
    return (
        f"{args.run_name}: {args.classifier_type} ({millions:.2f} M parameters), {methods}, {args.data_type}"
        f" ({train_loader.num_samples} training, {val_loader.num_samples} validation images of"
        f" {args.image_size} px, {train_loader.num_classes} classes), {args.end_epoch} epochs,"
        f" {args.precision} on {describe_machine(device)['device_name']}"
    )


if __name__ == "__main__":
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:  # closed by whoever started this; open() takes the lowest number that is free
            setattr(sys, stream, open(os.devnull, "w" if number else "r"))  # noqa: SIM115  (until the process ends)
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold letters that the terminal's encoding lacks
    sys.exit(main())
