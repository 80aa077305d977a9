"""Differences paired by seed, and intervals of Student's t."""

import math
import statistics
from typing import NamedTuple

import numpy as np
from runs import Column, Group, Run, other_splits


class Intervals(NamedTuple):
    """95 % intervals of several settings' means, and what they rest on."""

    half_widths: list[float | None]  # None where no setting has two seeds
    num_settings: int  # with two seeds or more
    degrees_of_freedom: float


def student_quantile(probability: float, degrees_of_freedom: float) -> float:
    """The t that |T| stays below with this probability, T being Student's with at least one degree of freedom.

    With T = sqrt(df) tan(theta), the density of theta is proportional to cos(theta)^(df - 1). It is integrated by
    Gauss and Legendre's rule, and theta found by bisection, to nine digits.
    """
    points, weights = np.polynomial.legendre.leggauss(100)
    log_factor = math.lgamma((degrees_of_freedom + 1) / 2) - math.lgamma(degrees_of_freedom / 2)
    factor = 2 * math.exp(log_factor) / math.sqrt(math.pi)
    low = 0.0
    high = math.pi / 2
    for _ in range(50):
        theta = (low + high) / 2
        angles = theta / 2 * (points + 1)
        density = factor * np.cos(angles) ** (degrees_of_freedom - 1)
        integral = theta / 2 * np.sum(weights * density)
        if integral < probability:
            low = theta
        else:
            high = theta
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def paired_intervals(differences: list[list[float]]) -> Intervals:
    """Intervals of mean differences from one base; their variance is pooled over the settings.

    The same runs of the base are in all settings' differences, which are therefore correlated, by 1/2 where all runs
    vary alike. The pooled variance of k settings with n seeds each then has not k (n - 1) degrees of freedom, but
    4 k / (k + 3) (n - 1) in Satterthwaite's approximation (Biometrics Bulletin, 1946).

    Args:
        differences: of each setting, one number per seed.
    """
    squares, num_free, num_settings = 0.0, 0, 0
    for values in differences:
        if len(values) > 1:
            squares += (len(values) - 1) * statistics.variance(values)
            num_free += len(values) - 1
            num_settings += 1
    if num_settings == 0:
        return Intervals([None] * len(differences), 0, 0.0)
    variance = squares / num_free
    degrees_of_freedom = num_free * 4 / (num_settings + 3)
    t = student_quantile(0.95, degrees_of_freedom)
    half_widths = [t * math.sqrt(variance / len(values)) for values in differences]
    return Intervals(half_widths, num_settings, degrees_of_freedom)


class Pairs(NamedTuple):
    """Those runs of a group that have a partner of the same seed in the base, and their partners."""

    group: Group
    partners: list[Run]


def pair_runs(base: str, groups: list[Group]) -> tuple[list[Pairs], list[str]]:
    """Groups beside the one labelled `base` of the same network on the same images; and a line for each run without
    such a partner."""
    bases = {}
    for group in groups:
        if group.label == base:
            bases |= {(group.data, run.network, run.seed): run for run in group.runs}
    paired, left_out = [], []
    for group in groups:
        if group.label == base:
            continue
        found = {}  # seed -> run, partner
        for run in group.runs:
            partner = bases.get((group.data, run.network, run.seed))
            if partner is None:
                left_out.append(f"{group.label}, seed {run.seed} (no {base} of its network, data and seed)")
            elif others := other_splits(run, partner):
                left_out.append(f"{group.label}, seed {run.seed} (its {base} has other {others} images)")
            else:
                found[run.seed] = run, partner
        if found:
            runs, partners = map(list, zip(*found.values(), strict=True))
            paired.append(Pairs(group._replace(runs=runs), partners))
    return paired, left_out


def differences(pairs: Pairs, column: Column) -> list[float] | None:
    """Of each pair, the run's number minus the partner's; None where one is missing, or where it is a time and several
    machines were used. A base without exits is its own early exit: its error, at 100 % of its cost."""
    runs = [*pairs.group.runs, *pairs.partners]
    if column.is_time and len(set().union(*(run.machines for run in runs))) > 1:
        return None
    found = []
    for run, partner in zip(pairs.group.runs, pairs.partners, strict=True):
        whole = {("early exit", "multiply_adds"): 100, ("early exit", "top1_error"): partner.values["final", "top1_error"]}
        number, of_partner = run.values.get(column.value), (whole | partner.values).get(column.value)
        if number is None or of_partner is None:
            return None
        found.append(number - of_partner)
    return found
