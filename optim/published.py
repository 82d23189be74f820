"""Converts optimizer state between `optim.Apollo` and the published implementation.

The published one keeps three tensors for each parameter: `exp_avg_grad` (m), `approx_hessian` (B) and `update` (d). It
counts steps in a Python int. Its sigma is a constant.
"""

from typing import Any

import torch

from .apollo_math import average_of

# What a group holds in both.
SHARED = ("lr", "beta", "eps", "warmup", "init_lr", "weight_decay", "weight_decay_type", "rebound")
SHARED += ("initial_lr", "param_names", "params")
DEFAULTS = {"weight_decay_type": "L2", "rebound": "constant", "maximize": False, "foreach": None, "fused": None}
DEFAULTS |= {"capturable": False, "carry_sums": True}


def from_published(state_dict: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Makes a state dict for `Apollo.load_state_dict` from the published optimizer's.

    Args:
        state_dict: the published optimizer's, over the same parameters in the same order.
        settings: for every group, instead of those in `state_dict`. `sigma` is always needed (1.0 or 0.01), and
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
    groups, state = [], {}
    for published in state_dict["param_groups"]:
        group = DEFAULTS | _shared(published) | settings
        groups.append(group)
        # With "belief" m is always kept: the last bound of D, max|g - m|, is not in the published state.
        stores = group["rebound"] == "belief" or (group["weight_decay"] != 0 and group["weight_decay_type"] != "L2")
        for i in (i for i in group["params"] if i in state_dict["state"]):
            old = state_dict["state"][i]
            if missing := {"step", "exp_avg_grad", "approx_hessian", "update"} - set(old):
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
    """The published optimizer's state dict from `Apollo.state_dict()`."""
    groups, state = [], {}
    for group in state_dict["param_groups"]:
        groups.append({**_shared(group), "base_lr": group.get("initial_lr", group["lr"])})
        for i in (i for i in group["params"] if i in state_dict["state"]):
            old = state_dict["state"][i]
            state[i] = {
                "step": int(old["step"]),
                "exp_avg_grad": old["exp_avg"].clone() if "exp_avg" in old else average_of(old, group),
                "approx_hessian": old["hessian"].clone(),
                "update": old["direction"].clone(),
            }
    return {"state": state, "param_groups": groups}


def _shared(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in SHARED if key in group}
