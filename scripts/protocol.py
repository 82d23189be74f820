"""The protocol by which scripts/compare.py tunes every method: the settings to try, as functions of the scores so far.

docs/comparing.md gives the reasons. A score is a validation value, negated if necessary, so that higher is better; -inf
for a trial that diverged.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FURTHEST = 9  # half decades from the centre; a search for the best rate stops there
FACTORS = (0.2, 1.0, 5.0)  # of the weight decay, tried at the best rate


@dataclass(frozen=True)
class Setting:
    rate: float
    decay: float | None  # None for a method without weight decay

    @property
    def name(self) -> str:
        return f"lr{self.rate:g}" + ("" if self.decay is None else f"_wd{self.decay:g}")


@dataclass(frozen=True)
class Method:
    row: str
    optimizer: Mapping[str, Any]  # as in a config; its lr is the centre of the grid
    decoupled: bool = False  # an update subtracts rate * decay times the weights; this product is kept and varied

    @property
    def decay(self) -> float | None:
        return self.optimizer.get("weight_decay") or None

    def setting(self, step: int, factor: float = 1.0) -> Setting:
        """The setting `step` half decades above the centre, with `factor` times the weight decay."""
        rate = rounded(self.optimizer["lr"] * 10 ** (step / 2))
        if self.decay is None:
            return Setting(rate, None)
        at_rate = self.optimizer["lr"] * self.decay / rate if self.decoupled else self.decay
        return Setting(rate, rounded(factor * at_rate))

    def override(self, setting: Setting) -> str:
        """The optimizer at `setting`, for a config. The rates and decays of its groups change in proportion."""
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
    """Three significant digits, so that the name of a trial shows the exact value that it is trained with."""
    return float(f"{value:.3g}")


def best_step(scores: Mapping[int, float]) -> int | None:
    """The step with the highest score; of several such steps the middle one. None if every trial diverged."""
    highest = max(scores.values())
    if highest == -math.inf:
        return None
    shared = sorted(step for step, score in scores.items() if score == highest)
    return shared[(len(shared) - 1) // 2]


def widened(methods: Iterable[Mapping[int, float]]) -> tuple[int, int]:
    """The lowest and the highest step that all methods must have been tried at.

    If a best step is at an edge, the grid grows there by one step. If a method has diverged at all its rates, it grows
    at the lower edge.
    """
    every = list(methods)
    low, high = min(every[0]), max(every[0])
    bests = [best_step(scores) for scores in every]
    further_down = any(best in (low, None) for best in bests) and low > -FURTHEST
    further_up = any(best == high for best in bests) and high < FURTHEST
    return low - further_down, high + further_up


def best_factor(scores: Mapping[float, float]) -> float:
    """The factor of the weight decay with the highest score. For equal scores 1 comes before 1/5, and 1/5 before 5."""
    return max(scores, key=lambda factor: (scores[factor], factor == 1, -factor))
