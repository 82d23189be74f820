"""The protocol of scripts/compare.py: the settings to try, as functions of the scores so far.

docs/comparing.md gives the reasons. A score is a validation value, negated where lower is better, or -inf for a
diverged trial.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FURTHEST = 9  # half decades from the centre: a search goes no further
FACTORS = (0.2, 1.0, 5.0)  # of the weight decay, at the best rate


@dataclass(frozen=True)
class Setting:
    rate: float
    decay: float | None

    @property
    def name(self) -> str:
        return f"lr{self.rate:g}" + ("" if self.decay is None else f"_wd{self.decay:g}")


@dataclass(frozen=True)
class Method:
    row: str
    optimizer: Mapping[str, Any]  # as in a config; its lr is the centre of the grid
    decoupled: bool = False  # updates subtract rate * decay * weights: this product is kept and varied

    @property
    def decay(self) -> float | None:
        return self.optimizer.get("weight_decay") or None

    def setting(self, step: int, factor: float = 1.0) -> Setting:
        """`step` half decades above the centre, with `factor` times the weight decay."""
        rate = rounded(self.optimizer["lr"] * 10 ** (step / 2))
        if self.decay is None:
            return Setting(rate, None)
        at_rate = self.optimizer["lr"] * self.decay / rate if self.decoupled else self.decay
        return Setting(rate, rounded(factor * at_rate))

    def override(self, setting: Setting) -> str:
        """The optimizer at `setting`, for a config. Groups change in proportion."""
        factors = {"lr": setting.rate / self.optimizer["lr"]}
        if setting.decay is not None:
            factors["weight_decay"] = setting.decay / self.decay

        def scaled(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {key: rounded(value * factors[key]) if key in factors else value for key, value in settings.items()}

        optimizer = scaled(self.optimizer)
        if "groups" in optimizer:
            optimizer["groups"] = [scaled(group) for group in optimizer["groups"]]
        return f"optimizer={json.dumps(optimizer)}"


def rounded(value: float) -> float:
    """Three significant digits: a trial's name shows its exact value."""
    return float(f"{value:.3g}")


def best_step(scores: Mapping[int, float]) -> int | None:
    """The step with the highest score, of several the middle one; None if all diverged."""
    highest = max(scores.values())
    if highest == -math.inf:
        return None
    shared = sorted(step for step, score in scores.items() if score == highest)
    return shared[(len(shared) - 1) // 2]


def widened(methods: Iterable[Mapping[int, float]]) -> tuple[int, int]:
    """The lowest and the highest step to try for all methods.

    The grid grows by one step at the edge where a best step is, and at the lower one if a method always diverged.
    """
    every = list(methods)
    low, high = min(every[0]), max(every[0])
    bests = [best_step(scores) for scores in every]
    further_down = any(best in (low, None) for best in bests) and low > -FURTHEST
    further_up = any(best == high for best in bests) and high < FURTHEST
    return low - further_down, high + further_up


def best_factor(scores: Mapping[float, float]) -> float:
    """The factor with the highest score; of equal ones 1 comes first, then 1/5."""
    return max(scores, key=lambda factor: (scores[factor], factor == 1, -factor))
