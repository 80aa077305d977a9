"""From flags to the objective: the one place that turns methods into terms."""

from loss.byot import BYOT
from loss.dml import DML, PublishedDML
from loss.objective import CrossEntropy, Objective
from loss.pskd import ProgressiveTargets

__all__ = ["Objective", "build_objective", "trained_exits"]


def build_objective(args, num_samples: int, num_classes: int) -> Objective:
    """The sum of the terms that the flags switch on.

    Args:
        args: the command line (`main.parse_args`).
        num_samples: M, images in the training split, the rows of PS-KD's memory.
        num_classes: K.
    """
    targets = ProgressiveTargets(num_samples, num_classes, args.alpha_T, args.end_epoch) if args.PSKD else None
    terms = [CrossEntropy()]
    if args.BYOT:
        terms.append(BYOT(args.alpha, args.temperature, args.beta, args.BYOT_from_k_block))
    if args.DML:
        terms.append(PublishedDML() if args.DML_as_published else DML(on_output=args.DML_on_output))
    return Objective(terms, targets)


def trained_exits(args) -> list[bool]:
    """For each exit, shallow to deep, whether a loss trains its classifier (a DML on features trains the exit's
    feature and leaves the classifier on top of it as it was initialised)."""
    num_exits = args.num_resnet_blocks - 1 if args.BYOT or args.DML else 0
    by_dml = args.DML and args.DML_on_output
    return [by_dml or (args.BYOT and i >= args.BYOT_from_k_block) for i in range(1, num_exits + 1)]
