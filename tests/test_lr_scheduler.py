"""Schedules against the published sequences, computed here from their definitions, and against torch's schedules."""

import io
import math

import pytest
import torch
from torch import nn

from optim import Apollo, create_optimizer, create_schedule


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


def test_resumes_through_a_file():
    settings = {"milestones": [3, 6], "warmup_updates": 2, "init_lr": 0.1}
    whole, first = sgd(), sgd()
    expected = rates(whole, create_schedule(whole, "milestone", **settings), 9)
    schedule = create_schedule(first, "milestone", **settings)
    taken = rates(first, schedule, 4)
    file = io.BytesIO()
    torch.save([first.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    second = sgd()
    resumed = create_schedule(second, "milestone", **settings)
    states = torch.load(file, weights_only=True)
    second.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert taken + rates(second, resumed, 5) == expected


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
