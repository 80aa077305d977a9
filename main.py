"""Train and evaluate image classifiers with PS-KD, BYOT and DML: flags in, a run directory out."""

import argparse
import contextlib
import functools
import os
import sys
import time
from pathlib import Path

import torch

from data import build_loaders
from loss import build_objective, trained_exits
from models import build_model
from utils import distributed
from utils.checkpoint import load_checkpoint, load_states, write_arrays
from utils.cuda_graph import GraphedStep
from utils.engine import Meter, autocast, evaluate, find_not_finite, learning_rate, predict, train_one_epoch, train_step
from utils.errors import UserError
from utils.flags import METHODS, parse_args
from utils.interrupt import Interrupted, signals_raise
from utils.logger import Logger
from utils.machine import describe_machine, has_bf16_instructions
from utils.run_directory import BEST, LAST, RunDirectory, best_record
from utils.seed import set_up_torch
from utils.validation import evaluation_command, validate_only


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 an error that its one line names, 128 + the number
    of the signal that stopped it (130 Ctrl-C, 143 SIGTERM, 129 a closed terminal)."""
    args = parse_args(argv)
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
        # "can't allocate memory": PyTorch on a CPU; ALLOC_FAILED: a CUDA library
        texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
        if isinstance(e, MemoryError) or any(text in str(e) for text in texts):
            message = (
                f"out of memory with --batch_size {args.batch_size} on {args.device}: lower --batch_size,"
                " --image_size or --width, or give --precision bf16"
            )
        elif type(e).__module__.startswith(("torch._dynamo", "torch._inductor")) or "Dynamo is not supp" in str(e):
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
    begun = args.overwrite and distributed.is_restart()  # by the processes before these: what they kept must stay
    args.overwrite = args.overwrite and not begun

    def start() -> dict | None:
        nonlocal run
        run = RunDirectory(Path(args.experiments_dir, args.run_name))
        return run.starting_point(vars(args), say=print)

    try:
        checkpoint = distributed.from_main(start)
        if checkpoint and distributed.from_main(lambda: nothing_left(args, run, checkpoint)):
            if begun:
                raise UserError(
                    f"{args.run_name} is finished, perhaps long since: processes given --overwrite died, and may not"
                    " have come to do it; give the command again"
                )
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
                if run.num_kept is None and args.overwrite:
                    what = "nothing was done; what the run directory holds is as it was"
                if run.num_kept:
                    epochs = "1 epoch is" if run.num_kept == 1 else f"{run.num_kept} epochs are"
                    what = f"{epochs} kept in {run.path / LAST}; {again} goes on from there"
                with contextlib.suppress(OSError):  # the terminal may be gone
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
        if what := find_not_finite(model, trained["train"]):
            raise not_finite(what, epoch, epoch, args)
        logits, labels = predict(model.eval(), val_loader, context)
        if not run:
            continue
        record = {"epoch": epoch, "lr": lr, "alpha_t": objective.alpha_t, **trained}
        try:
            history.append(record | evaluate(logits, labels, trained_exits(args)))
        except ValueError:
            raise not_finite("a validation logit", epoch, epoch, args) from None
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


def not_finite(what: str, epoch: int, num_kept: int, args) -> UserError:
    """The error that stops a run: what is not finite since which epoch, what is kept, what to try."""
    kept = f"the checkpoint of epoch {num_kept} is kept" if num_kept else "no epoch was finished"
    remedy = "a lower --lr, more steps an epoch" + ("" if args.precision == "fp32" else " or --precision fp32")
    return UserError(f"epoch {epoch + 1}: {what} is not finite (NaN or infinite); {kept}; try {remedy}")


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
            try:
                test[name] = {"epoch": epoch, **evaluate(logits, labels, trained_exits(args))}
            except ValueError:
                raise not_finite("a logit of the test split", epoch, len(history), args) from None
    return test


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
