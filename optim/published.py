"""Converts optimizer state between `optim.Apollo` and the published implementation of Apollo.

The published implementation keeps three tensors for each parameter: `exp_avg_grad` (m), `approx_hessian` (B) and
`update` (the direction d of the last step). It counts steps in a Python int. There sigma is a constant of the era and
not a setting.
"""

from typing import Any

import torch
from torch import Tensor

from .apollo_math import curvature_offset

# Settings that have the same name in both. Only `optim.Apollo` has the others (sigma, foreach, ...).
SHARED = ("lr", "beta", "eps", "warmup", "init_lr", "weight_decay", "weight_decay_type", "rebound")


def from_published(state_dict: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Makes a state dict for `Apollo.load_state_dict` from the published optimizer's state dict.

    Args:
        state_dict: the published optimizer's, over the same parameters in the same order.
        settings: for every group. They override those in `state_dict`. `sigma` is always needed (1.0 or 0.01), and
            `weight_decay_type` if the published version fixed it.

    Raises:
        ValueError: the state is not the published optimizer's, or sigma is missing.
    """
    if "sigma" not in settings:
        raise ValueError(
            "from_published needs sigma, which the published state does not hold: 1.0 (2020) or 0.01 (2021)"
        )
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("not an optimizer's state dict: it has no state or no param_groups")
    defaults = {"weight_decay_type": "L2", "rebound": "constant", "maximize": False, "foreach": None, "fused": None}
    defaults |= {"capturable": False, "carry_sums": True}
    groups, state = [], {}
    for group in state_dict["param_groups"]:
        known = {key: group[key] for key in SHARED if key in group}
        extra = {key: group[key] for key in ("initial_lr", "param_names") if key in group}
        group = {
            **defaults,
            "capturable": False,
            "carry_sums": True,
            **known,
            **extra,
            **settings,
            "params": group["params"],
        }
        groups.append(group)
        # With "belief" m is kept for every decay type: the last bound of D, max|g - m|, is not in the published state.
        stores = group["rebound"] == "belief" or (group["weight_decay"] != 0 and group["weight_decay_type"] != "L2")
        for i in group["params"]:
            if i not in state_dict["state"]:
                continue
            old = state_dict["state"][i]
            missing = {"step", "exp_avg_grad", "approx_hessian", "update"} - set(old)
            if missing:
                raise ValueError(
                    f"not a state of the published Apollo: parameter {i} has no {', '.join(sorted(missing))}"
                )
            state[i] = {
                "step": torch.tensor(float(old["step"]), dtype=torch.float32),
                "hessian": old["approx_hessian"].clone(),
                "direction": old["update"].clone(),
            }
            if stores:
                state[i]["exp_avg"] = old["exp_avg_grad"].clone()
    return {"state": state, "param_groups": groups}


def to_published(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The published optimizer's state dict from `Apollo.state_dict()`, without the settings that only `Apollo` has."""
    groups, state = [], {}
    for group in state_dict["param_groups"]:
        extra = {key: group[key] for key in ("initial_lr", "param_names") if key in group}
        known = {key: group[key] for key in SHARED}
        groups.append({**known, **extra, "base_lr": group.get("initial_lr", group["lr"]), "params": group["params"]})
        for i in group["params"]:
            if i in state_dict["state"]:
                old = state_dict["state"][i]
                state[i] = {
                    "step": int(old["step"]),
                    "exp_avg_grad": _exp_avg(old, group),
                    "approx_hessian": old["hessian"].clone(),
                    "update": old["direction"].clone(),
                }
    return {"state": state, "param_groups": groups}


def _exp_avg(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if "exp_avg" in state:
        return state["exp_avg"].clone()
    bound = state["sigma"] if group["rebound"] == "belief" else group["sigma"]
    offset = curvature_offset(group["eps"], group["beta"], float(state["step"]), group["rebound"])
    return state["direction"] * (state["hessian"].abs().clamp_(min=bound) + offset)
