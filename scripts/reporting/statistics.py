"""Intervals, tests and expectations over runs or trials. scipy is imported late: that takes a second."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from statistics import mean, stdev
from typing import NamedTuple


class Difference(NamedTuple):
    """a − b of two means, its 95 % interval, and the p-value of Welch's t-test."""

    mean: float
    low: float
    high: float
    p: float


def spread(values: Sequence[float]) -> str:
    """`mean (std)` with the sample standard deviation; of one value the mean."""
    if not values:
        return ""
    varies = len(values) > 1 and math.isfinite(mean(values))
    return f"{mean(values):.2f}" + (f" ({stdev(values):.2f})" if varies else "")


def interval(values: Sequence[float], level: float = 0.95, more: int = 0) -> tuple[float, float] | None:
    """Student's interval of the mean, or with `more=1` of one more normal value.

    None for fewer than two values, or if one is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    half = quantile(len(values), level) * stdev(values) * math.sqrt(more + 1 / len(values))
    return mean(values) - half, mean(values) + half


@cache
def quantile(count: int, level: float) -> float:
    """Half an interval in standard errors: Student's t with count − 1 degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, count - 1))


def welch(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """Welch's t-test; None if a sample has no `interval`, or neither varies."""
    if interval(a) is None or interval(b) is None or (stdev(a) == 0 and stdev(b) == 0):
        return None
    from scipy import stats

    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(mean(a) - mean(b), float(low), float(high), float(test.pvalue))


def expected_best(trials: Sequence[tuple[float, float]], lower_is_better: bool) -> list[float]:
    """The expected result of a search with a budget of k trials, for k = 1 … N. A trial is a pair of values. Of k
    trials, drawn without replacement, the best by the first value is chosen; its second value is the result.

    Dodge et al. 2019 (arXiv 1910.11758) draw with replacement. Without it, the i-th worst of N trials is the best of k
    with probability C(i−1, k−1) / C(N, k). Equal first values share the mean of their second values.
    """
    count = len(trials)
    ordered = sorted(trials, key=lambda trial: trial[0], reverse=lower_is_better)  # worst first
    seconds: list[float] = []
    for _, tied in groupby(ordered, key=lambda trial: trial[0]):
        values = [second for _, second in tied]
        seconds += [mean(values)] * len(values)
    return [
        math.fsum(math.comb(i, k - 1) / math.comb(count, k) * seconds[i] for i in range(k - 1, count))
        for k in range(1, count + 1)
    ]
