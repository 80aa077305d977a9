"""The methods: their flags, and the one function that turns them into terms of the loss."""

import functools

from loss.byot import BYOT
from loss.dml import DML, PublishedDML
from loss.objective import CrossEntropy, LabelSmoothing, Objective
from loss.pskd import ProgressiveTargets
from utils.parser import add_number, add_switch

METHODS = ("PSKD", "BYOT", "DML")
HYPERPARAMETERS = {"PSKD": ("alpha_T",), "BYOT": ("alpha", "temperature", "beta", "BYOT_from_k_block")}


def add_flags(parser) -> None:
    group = parser.add_argument_group("methods (all off: the baseline)")
    switch, number = functools.partial(add_switch, group), functools.partial(add_number, group)
    switch("--PSKD", help="soften labels with the network's predictions of the previous epoch")
    switch("--BYOT", help="let the final classifier teach the exits (paper, eq. 2)")
    switch("--DML", help="let exits and final feature learn from each other (paper, eq. 3)")
    number(
        "--alpha_T", float, 0.8, 0, 1, "PS-KD: weight of the previous prediction; grows linearly to this", "PS-KD paper"
    )
    number("--alpha", float, 0.1, 0, 1, "BYOT: weight of the teacher loss; labels get 1 - alpha", "paper")
    text = "BYOT: tau, which divides the logits in the teacher loss"
    number("--temperature", float, 3.0, 0.01, 1000, text, "published script")
    text = "BYOT: weight of the hint, the squared distance of an exit's feature from the final one, a sum over the"
    text += " batch, so that it grows with --batch_size"
    number("--beta", float, 1e-6, 0, 1000, text, "paper")
    number("--BYOT_from_k_block", int, 1, 1, 3, "BYOT: first exit trained by BYOT", "paper, Table 3")
    switch("--DML_on_output", help="DML: compare logits in place of features")
    switch("--DML_as_published", help="DML: the published script's value, which has no gradient")
    text = "weight of the uniform distribution mixed into each label, in every cross-entropy; not with --PSKD"
    number("--label_smoothing", float, 0.0, 0, 0.9, text, "off")


def check_flags(args, fail) -> None:
    """Check combinations of the methods' flags, and tell from the losses whether the network needs exits;
    `fail(message)` reports an error and does not return."""
    for off in ("DML_on_output", "DML_as_published"):
        if getattr(args, off) and not args.DML:
            fail(f"argument --{off}: has no effect without --DML")
    if args.DML_on_output and args.DML_as_published:
        fail("argument --DML_on_output: cannot be used with --DML_as_published")
    if args.label_smoothing and args.PSKD:
        fail("argument --label_smoothing: cannot be used with --PSKD, which softens the labels itself")
    args.exits = any(term.uses_exits for term in build_objective(args, num_samples=1, num_classes=1).terms)
    exits = args.num_resnet_blocks - 1
    if args.exits and not exits:
        fail("argument --num_resnet_blocks: 1 block has no exit for the losses; use 2 to 4")
    if args.BYOT and args.BYOT_from_k_block > exits:
        fail(
            f"argument --BYOT_from_k_block: {args.BYOT_from_k_block} exceeds the number of exits; "
            f"{args.num_resnet_blocks} blocks have exits 1 to {exits}"
        )


def notes(args, given: set[str]) -> list[str]:
    """Warnings of hyper-parameters of methods that are off, among the flags that are given."""
    found = []
    for method, names in HYPERPARAMETERS.items():
        if not getattr(args, method):
            found += [f"--{name} has no effect without --{method}" for name in names if name in given]
    return found


def build_objective(args, num_samples: int, num_classes: int) -> Objective:
    """The sum of the terms that the flags switch on.

    Args:
        args: the command line (`main.parse_args`).
        num_samples: M, images in the training split, the rows of PS-KD's memory.
        num_classes: K.
    """
    soften = None
    if args.PSKD:
        soften = ProgressiveTargets(num_samples, num_classes, args.alpha_T, args.end_epoch)
    elif args.label_smoothing:
        soften = LabelSmoothing(args.label_smoothing)
    terms = [CrossEntropy()]
    if args.BYOT:
        terms.append(BYOT(args.alpha, args.temperature, args.beta, args.BYOT_from_k_block))
    if args.DML:
        terms.append(PublishedDML() if args.DML_as_published else DML(on_output=args.DML_on_output))
    return Objective(terms, soften)
