"""Differences paired by seed, and intervals of Student's t."""

import math
import statistics
from typing import NamedTuple

import numpy as np
from runs import Group, Run


class Intervals(NamedTuple):
    """95 % intervals of several settings' means, and what they rest on."""

    half_widths: list[float | None]  # None where no setting has two seeds
    num_settings: int  # with two seeds or more
    degrees_of_freedom: float


def student_quantile(probability: float, degrees_of_freedom: float) -> float:
    """The t that |T| stays below with this probability, T being Student's with at least one degree of freedom.

    With T = sqrt(df) tan(theta), the density of theta is proportional to cos(theta)^(df - 1). Its sum over a fine grid
    gives seven digits.
    """
    edges = np.linspace(0, math.pi / 2, 100_001)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = np.cumsum(np.cos(middles) ** (degrees_of_freedom - 1))
    theta = np.interp(probability, mass / mass[-1], edges[1:])
    return math.sqrt(degrees_of_freedom) * math.tan(theta)


def paired_intervals(differences: list[list[float] | None]) -> Intervals:
    """Intervals of mean differences from one base; their variance is pooled over the settings.

    The same runs of the base are in all settings' differences, which are therefore correlated, by 1/2 where all runs
    vary alike. The pooled variance of k settings with n seeds each then has not k (n - 1) degrees of freedom, but
    4 k / (k + 3) (n - 1) in Satterthwaite's approximation (Biometrics Bulletin, 1946).

    Args:
        differences: of each setting, one number per seed, or None where it lacks them.
    """
    repeated = [values for values in differences if values and len(values) > 1]
    if not repeated:
        return Intervals([None] * len(differences), 0, 0.0)
    num_free = sum(len(values) - 1 for values in repeated)
    variance = sum((len(values) - 1) * statistics.variance(values) for values in repeated) / num_free
    degrees_of_freedom = num_free * 4 / (len(repeated) + 3)
    t = student_quantile(0.95, degrees_of_freedom)
    half_widths = [values and t * math.sqrt(variance / len(values)) for values in differences]
    return Intervals(half_widths, len(repeated), degrees_of_freedom)


class Pairs(NamedTuple):
    """Those runs of a group that have a partner of the same seed in the base, and their partners."""

    group: Group
    partners: list[Run]


def pair_runs(base: str, groups: list[Group]) -> tuple[list[Pairs], list[str]]:
    """Groups beside the one labelled `base` of the same network on the same images; and a line for each run without
    such a partner. A base without exits is its own early exit: its error, at 100 % of its cost."""
    bases = {}
    for group in groups:
        for run in group.runs if group.label == base else ():
            error = run.values.get(("final", "top1_error"))
            whole = {("early exit", "multiply_adds"): 100, ("early exit", "top1_error"): error}
            bases[group.data, run.network, run.seed] = run._replace(values=whole | run.values)
    paired, left_out = [], []
    for group in groups:
        if group.label == base:
            continue
        runs, partners = [], []
        for run in group.runs:
            partner = bases.get((group.data, run.network, run.seed))
            if partner is None or any(partner.splits.get(name, split) != split for name, split in run.splits.items()):
                left_out.append(f"{group.label}, seed {run.seed} (no {base} of its network, images and seed)")
            else:
                runs.append(run)
                partners.append(partner)
        if runs:
            paired.append(Pairs(group._replace(runs=runs), partners))
    return paired, left_out
