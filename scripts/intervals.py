"""Differences paired by seed, and intervals of Student's t."""

import math
import statistics
from typing import NamedTuple

import numpy as np
from runs import Run, other_images


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


def pair_runs(base: str, groups: list[list[Run]]) -> tuple[list[list[Run]], list[str]]:
    """Groups whose values are differences, by seed, from the runs labelled `base` of the same network on the same
    images; and a line for each setting that has runs without such a base."""
    bases = {(run.data, run.network, run.seed): run for group in groups for run in group if run.label == base}
    paired, left_out = [], []
    for group in groups:
        if group[0].label == base:
            continue
        differences = []
        unpaired = {}  # reason -> seeds
        for run in group:
            of_base = bases.get((run.data, run.network, run.seed))
            if of_base is None:
                reason = f"no {base} of its network, data and seed"
                unpaired.setdefault(reason, []).append(run.seed)
                continue
            others = other_images(run, of_base)
            if others:
                reason = f"its {base} has other {', '.join(others)}"
                unpaired.setdefault(reason, []).append(run.seed)
                continue
            shared = run.values.keys() & of_base.values.keys()
            values = {key: run.values[key] - of_base.values[key] for key in shared}
            differences.append(run._replace(values=values))
        if differences:
            paired.append(differences)
        for reason, seeds in unpaired.items():
            left_out.append(f"{group[0].label}, seed {' '.join(map(str, seeds))} ({reason})")
    return paired, left_out
