"""Schedules against the published sequences, computed here from their definitions, and against torch's schedules."""

import io
import math

import pytest
import torch
from torch import nn

from optim import Apollo, create_optimizer, create_schedule

TORCH = "torch.optim.lr_scheduler"


def sgd(lr: float = 1.0, **settings) -> torch.optim.Optimizer:
    return create_optimizer("sgd", [nn.Parameter(torch.zeros(1))], lr=lr, **settings)


def rates(optimizer: torch.optim.Optimizer, schedule, updates: int) -> list[float]:
    taken = []
    for _ in range(updates):
        taken.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return taken


def test_cifar_milestone():
    """lr 0.5, 100 updates of warmup from 0.01; x 0.1 before epochs 80 and 120 of 164, 390 updates each."""
    optimizer = sgd(0.5)
    settings = {"milestones": [80, 120], "decay_rate": 0.1, "warmup_updates": 100, "init_lr": 0.01}
    taken = rates(optimizer, create_schedule(optimizer, "milestone", updates_per_unit=390, **settings), 164 * 390)
    expected = [0.01 + 0.49 * t / 100 for t in range(100)] + [0.5] * (80 * 390 - 100) + [0.05] * (40 * 390)
    assert taken == pytest.approx(expected + [0.005] * (44 * 390))


def test_cifar_cosine_is_torchs_once_per_epoch():
    """lr 0.1 to 1e-4 over 200 epochs."""
    optimizer, reference = sgd(0.1), sgd(0.1)
    schedule = create_schedule(optimizer, "cosine", updates_per_unit=3, total=200, last_lr=1e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=200, eta_min=1e-4)
    assert rates(optimizer, schedule, 600)[::3] == pytest.approx(rates(reference, theirs, 200))
    assert rates(optimizer, schedule, 4) == pytest.approx([1e-4] * 4)  # and stays there, where torch's rises again


def test_cosine_warmup_longer_than_an_epoch():
    """The warmup rises to lr itself. The cosine counts its epochs from the start of training."""
    optimizer = sgd(0.01)
    settings = {"last_lr": 1e-5, "warmup_updates": 5, "init_lr": 1e-5}
    taken = rates(optimizer, create_schedule(optimizer, "cosine", updates_per_unit=4, total=10, **settings), 40)
    assert taken[:5] == pytest.approx([1e-5 + (0.01 - 1e-5) * t / 5 for t in range(5)])
    cosine = [1e-5 + (0.01 - 1e-5) * (1 + math.cos(math.pi * (t // 4) / 10)) / 2 for t in range(40)]
    assert taken[5:] == pytest.approx(cosine[5:])


def test_language_model_milestone():
    """lr 10, 400 updates of warmup; x 0.1 before epochs 12 and 18 of 20."""
    optimizer = sgd(10.0)
    settings = {"milestones": [12, 18], "warmup_updates": 400, "init_lr": 0.01}
    taken = rates(optimizer, create_schedule(optimizer, "milestone", updates_per_unit=100, **settings), 2000)
    assert taken[:400] == pytest.approx([0.01 + 9.99 * t / 400 for t in range(400)])
    assert (set(taken[400:1200]), set(taken[1200:1800])) == ({10.0}, {1.0})
    assert taken[1800:] == pytest.approx([0.1] * 200)


def test_translation_inverse_sqrt_is_fairseqs():
    """lr 5e-4, 4000 updates of warmup from 1e-7, then lr * sqrt(4000) / sqrt(t)."""
    optimizer = sgd(5e-4)
    schedule = create_schedule(optimizer, "inverse_sqrt", warmup_updates=4000, init_lr=1e-7)
    rise, factor = (5e-4 - 1e-7) / 4000, 5e-4 * 4000**0.5
    expected = [1e-7 + t * rise if t < 4000 else factor * t**-0.5 for t in range(9000)]
    assert rates(optimizer, schedule, 9000) == pytest.approx(expected)


def test_translation_milestone_counts_updates():
    """lr 10, x 0.1 at updates 250,000 and 450,000. Here all numbers of updates are divided by a thousand."""
    optimizer = sgd(10.0)
    settings = {"milestones": [250, 450], "decay_rate": 0.1, "warmup_updates": 1, "init_lr": 0.01}
    taken = rates(optimizer, create_schedule(optimizer, "milestone", **settings), 500)
    assert taken == pytest.approx([0.01] + [10.0] * 249 + [1.0] * 200 + [0.1] * 50)


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_warmup_of_the_optimizer_and_of_the_schedule_agree(how):
    """Apollo(warmup=, init_lr=) and schedule(warmup_updates=, init_lr=) take the same steps."""
    finals = []
    for own in (True, False):
        param = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))
        warmup = {"warmup": 7, "init_lr": 0.01} if own else {"warmup": 0}
        optimizer = Apollo([param], lr=0.5, weight_decay=1e-3, **warmup, **how)
        settings = {} if own else {"warmup_updates": 7, "init_lr": 0.01}
        schedule = create_schedule(optimizer, "milestone", milestones=[10], **settings)
        for step in range(15):
            draw = torch.Generator().manual_seed(step)
            param.grad = param.detach() + 0.1 * torch.randn(12, generator=draw, dtype=torch.float64)
            optimizer.step()
            schedule.step()
        finals.append(param.detach())
    torch.testing.assert_close(*finals, rtol=1e-14, atol=0)


def test_linear_is_literal_and_torchs():
    """lr 2, 10 updates of warmup from 0.5, then down to 0.1 at update 50, the end of 5 epochs of 10 updates."""
    optimizer, reference = sgd(2.0), sgd(2.0)
    settings = {"warmup_updates": 10, "init_lr": 0.5, "last_lr": 0.1}
    taken = rates(optimizer, create_schedule(optimizer, "linear", updates_per_unit=10, total=5, **settings), 52)
    expected = [0.5 + 1.5 * t / 10 for t in range(10)] + [2.0 - 1.9 * (t - 10) / 40 for t in range(10, 50)]
    assert taken == pytest.approx([*expected, 0.1, 0.1])
    theirs = torch.optim.lr_scheduler.LinearLR(reference, 1.0, 0.1 / 2.0, total_iters=40)
    assert taken[10:] == pytest.approx(rates(reference, theirs, 42))


def test_wsd_is_literal():
    """lr 2, 10 updates of warmup, then 2 as long as a quarter of 48 updates is left, and down to 0 in that quarter."""
    optimizer = sgd(2.0)
    settings = {"warmup_updates": 10, "decay_share": 0.25}
    taken = rates(optimizer, create_schedule(optimizer, "wsd", updates_per_unit=12, total=4, **settings), 50)
    expected = [2.0 * t / 10 for t in range(10)] + [2.0] * 26 + [2.0 * (48 - t) / 12 for t in range(36, 48)]
    assert taken == pytest.approx([*expected, 0.0, 0.0])


def test_wsd_with_one_update_of_decay():
    optimizer = sgd(2.0)
    assert rates(optimizer, create_schedule(optimizer, "wsd", total=6, decay_share=0.01), 7) == [2.0] * 6 + [0.0]


TORCHS = {
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.1},
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "LinearLR": {"start_factor": 0.25, "total_iters": 4},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 12},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 2.0, "total_steps": 12},
}


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_class_of_torch_after_a_warmup(name, as_tensor):
    """The warmup rises to the first rate of torch's class, whose sequence then follows from its beginning."""
    reference = sgd(1.0, momentum=0.9)
    theirs = rates(reference, getattr(torch.optim.lr_scheduler, name)(reference, **TORCHS[name]), 12)
    dotted = f"{TORCH}.{name}"
    lr = torch.tensor(1.0, dtype=torch.float64) if as_tensor else 1.0
    alone, warmed = (sgd(lr if isinstance(lr, float) else lr.clone(), momentum=0.9) for _ in range(2))
    mine, kept = alone.param_groups[0]["lr"], warmed.param_groups[0]["lr"]
    assert rates(alone, create_schedule(alone, dotted, **TORCHS[name]), 12) == pytest.approx(theirs)
    keeps = as_tensor and alone.param_groups[0]["lr"] is mine  # CosineAnnealingWarmRestarts of torch 2.6 does not
    schedule = create_schedule(warmed, dotted, warmup_updates=5, init_lr=0.01, **TORCHS[name])
    assert schedule.get_last_lr() == [0.01]
    taken = rates(warmed, schedule, 17)
    assert taken == pytest.approx([0.01 + (theirs[0] - 0.01) * t / 5 for t in range(5)] + theirs)
    assert not keeps or warmed.param_groups[0]["lr"] is kept


def test_groups_and_tensors():
    """Each group follows its own learning rate. If that is a tensor, it stays the same tensor."""
    lr = torch.tensor(2.0)
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = Apollo([{"params": params[0]}, {"params": params[1], "lr": lr}], lr=1.0, warmup=0)
    schedule = create_schedule(optimizer, "milestone", milestones=[2], decay_rate=0.5, warmup_updates=2)
    seen = []
    for _ in range(4):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        assert optimizer.param_groups[1]["lr"] is lr
        optimizer.step()
        schedule.step()
    assert seen == [[0.0, 0.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]


OURS = {
    "constant": {},
    "milestone": {"milestones": [3, 6]},
    "cosine": {"total": 9},
    "inverse_sqrt": {},
    "linear": {"total": 9},
    "wsd": {"total": 9, "decay_share": 0.5},
}
EVERY = OURS | {f"{TORCH}.{name}": settings for name, settings in TORCHS.items()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("saved_after", [1, 4])  # in the warmup, and behind it
def test_resumes_through_a_file(name, saved_after):
    settings = {"warmup_updates": 2, "init_lr": 0.1} | EVERY[name]
    whole, first = sgd(momentum=0.9), sgd(momentum=0.9)
    expected = rates(whole, create_schedule(whole, name, **settings), 9)
    schedule = create_schedule(first, name, **settings)
    taken = rates(first, schedule, saved_after)
    file = io.BytesIO()
    torch.save([first.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    second = sgd(momentum=0.9)
    resumed = create_schedule(second, name, **settings)
    states = torch.load(file, weights_only=True)
    second.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert taken + rates(second, resumed, 9 - saved_after) == expected
    assert second.param_groups[0]["momentum"] == whole.param_groups[0]["momentum"]  # which some classes change


def thirds(optimizer: torch.optim.Optimizer, of: float = 3.0) -> torch.optim.lr_scheduler.LRScheduler:
    """What somebody writes who needs a function of the update, which a config cannot hold."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update / of))


def test_a_function_of_ones_own():
    optimizer = sgd(1.0)
    taken = rates(optimizer, create_schedule(optimizer, f"{__name__}.thirds", of=2.0, warmup_updates=2), 5)
    assert taken == pytest.approx([0, 1 / 2, 1, 2 / 3, 1 / 2])


def test_every_class_of_torch_is_tried_or_takes_what_a_config_cannot_give():
    takes_objects = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
    refused = {"ReduceLROnPlateau", "LRScheduler"}
    assert set(torch.optim.lr_scheduler.__all__) <= set(TORCHS) | takes_objects | refused


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("milestones", {}, "unknown schedule 'milestones'; did you mean 'milestone'? valid: constant, milestone,"),
        (
            "milestone",
            {"milestone": [3]},
            "schedule 'milestone' has no setting 'milestone'; did you mean 'milestones'?",
        ),
        ("constant", {"last_lr": 0.1}, "schedule 'constant' has no setting 'last_lr'; valid: warmup_updates, init_lr"),
        ("milestone", {}, "milestones must be an increasing list of whole numbers > 0, got None"),
        ("milestone", {"milestones": [6, 3]}, "milestones must be an increasing list"),
        ("milestone", {"milestones": "3"}, "milestones must be an increasing list"),
        ("milestone", {"milestones": [3], "decay_rate": math.nan}, "decay_rate must be a finite number >= 0"),
        ("cosine", {}, "total must be the training's length in units, > 0, got None"),
        ("cosine", {"total": 3, "last_lr": -1}, "last_lr must be a finite number >= 0, got -1"),
        ("inverse_sqrt", {}, "warmup_updates must be a whole number >= 1, got 0"),
        ("constant", {"warmup_updates": 1.5}, "warmup_updates must be a whole number >= 0, got 1.5"),
        ("constant", {"updates_per_unit": 0}, "updates_per_unit must be a whole number > 0, got 0"),
        ("constant", {"init_lr": "fast"}, "init_lr must be a finite number >= 0, got 'fast'"),
        ("linaer", {}, "unknown schedule 'linaer'; did you mean 'linear'?"),
        ("StepLR", {}, "or a dotted path, torch.optim.lr_scheduler.StepLR"),
        ("linear", {}, "total must be the training's length in units, > 0, got None"),
        ("linear", {"total": 5, "warmup_updates": 5}, "warmup_updates must be below the training's 5 updates, got 5"),
        ("wsd", {"total": 10, "warmup_updates": 9}, "warmup_updates must be <= 8, where the decay begins, got 9"),
        ("wsd", {"total": 10, "decay_share": 1.5}, "decay_share must be a number > 0 and <= 1, got 1.5"),
        (f"{TORCH}.StepLT", {}, f"{TORCH} has no 'StepLT'; did you mean 'StepLR'? valid: "),
        (f"{TORCH}s.StepLR", {}, f"'{TORCH}s.StepLR' cannot be imported: ModuleNotFoundError"),
        (f"{TORCH}.StepLR", {"step": 3}, "has no setting 'step'; did you mean 'step_size'?"),
        (f"{TORCH}.StepLR", {}, "needs the setting 'step_size'"),
        (f"{TORCH}.StepLR", {"step_size": 3, "warmup_updates": -1}, "warmup_updates must be a whole number >= 0"),
        (f"{TORCH}.LambdaLR", {"lr_lambda": "0.5"}, "LambdaLR': 'str' object is not callable"),
        (f"{TORCH}.ReduceLROnPlateau", {}, "ReduceLROnPlateau' waits for a metric"),
        (f"{TORCH}.OneCycleLR", {"max_lr": 1.0, "total_steps": 9, "total": 10}, "ends after total_steps=9, before"),
        ("copy.copy", {}, "does not make a torch.optim.lr_scheduler.LRScheduler"),
        ("..", {}, "'..' is no dotted path"),
    ],
)
def test_bad_names_and_settings(name, settings, message):
    with pytest.raises(ValueError) as error:
        create_schedule(sgd(), name, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_warmup_only():
    optimizer = Apollo([nn.Parameter(torch.zeros(1))], lr=1.0)
    create_schedule(optimizer, "constant")
    with pytest.raises(ValueError, match="both optimizer and schedule warm up: pass warmup=0"):
        create_schedule(optimizer, "constant", warmup_updates=10)
