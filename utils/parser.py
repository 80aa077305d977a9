"""The parser of every command line, and types of its values. Needs no PyTorch."""

import argparse
import contextlib
import difflib
import os
import sys
from pathlib import Path

from utils import launch
from utils.errors import printable


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags have kinds (`add_flag`), and whose error is one line from each machine."""

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            flag, _, value = word.partition("=")
            if flag.startswith("-") and value == "--":  # which argparse would take for no value
                self.error(f"argument {flag}: '--' is not a value")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            meant = [meant for word in unknown if word.startswith("--") for meant in self._meant_by(word)]
            hint = f" (did you mean {' or '.join(dict.fromkeys(meant))}?)" if meant else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def _meant_by(self, word: str) -> list[str]:
        """The flags that an unknown one may mean: those with a name like it, here or in other programs."""
        flags = [(name, a.dest) for a in self._actions for name in (a.dest, *getattr(a, "also", ()))]
        given = word.lstrip("-").partition("=")[0].lower()
        nearest = difflib.get_close_matches(given, [name.lower() for name, _ in flags], n=1, cutoff=0.75)
        return [f"--{flag}" for name, flag in flags if name.lower() in nearest]

    def error(self, message: str):
        if not launch.WORLD.is_local_main:  # what is wrong with flags or machine is wrong for all of its processes
            launch.wait_for_rank_0()
        super().error(printable(message))

    def names(self, *kinds: str) -> set[str]:
        """The flags of these kinds."""
        return {action.dest for action in self._actions if getattr(action, "kind", None) in kinds}

    def given(self, argv: list[str] | None) -> set[str]:
        """The flags that stand on a command line."""
        unset = dict.fromkeys(action.dest for action in self._actions)
        parsed = self.parse_args(argv, argparse.Namespace(**unset))
        return {name for name, value in vars(parsed).items() if value is not None}


def number_type(kind: type, low, high):
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        word, spec = ("integer", "") if kind is int else ("number", "g")
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid {word}, from {low:{spec}} to {high:{spec}}")

    return convert


def check_name(text: str) -> str:
    """An argparse type: a path, or a part of one, whose names are as short as file systems need."""
    if any(len(os.fsencode(name)) > 255 for name in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text[:20]!r}... is longer than the 255 bytes that a name may have")
    return text


def expanded(text: str) -> str:
    """An argparse type: a path in which `~` is expanded, as shells do not after `=`."""
    return os.path.expanduser(check_name(text))


def path_type(text: str) -> Path:
    """An argparse type: `expanded`, as a Path."""
    return Path(expanded(text))


def add_flag(group, flag: str, kind: str = "experiment", also: str = "", **options) -> None:
    """Add a flag.

    Args:
        kind: "experiment": it defines the experiment, as all do that do not say otherwise. "runtime": it says where and
            how a run is computed or stored, so that it may differ on resume. "machine": so it does, and the processes
            of one run may differ in it.
        also: what other programs call it, to answer those who type that.
        options: argparse's.
    """
    action = group.add_argument(flag, **options)
    action.kind, action.also = kind, also.split()


def add_switch(group, flag: str, kind: str = "experiment", **options) -> None:
    """Add a flag that is off unless it is given."""
    add_flag(group, flag, kind, action="store_true", **options)


def add_number(group, flag: str, number: type, default, low, high, text: str, reason: str, **options) -> None:
    """Add a flag for a number from `low` to `high`; `reason` is the default's reason or source, `options` are
    add_flag's."""
    shown = "" if default is None else f"{default:g}, "
    text = f"{text} (default: {shown}{reason})"
    metavar = "N" if number is int else "X"
    convert = number_type(number, low, high)
    add_flag(group, flag, type=convert, default=default, metavar=metavar, help=text, **options)


def add_path(group, flag: str, kind: str, text: str, **options) -> None:
    """Add a flag for a path, as a string in which `~` is expanded."""
    add_flag(group, flag, kind, type=expanded, help=text, **options)
