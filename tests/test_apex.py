"""The apex adapter. A stand-in has apex's documented interface, because an apex with amp cannot be built everywhere. So
this tests that the adapter calls the interface in the right order, not the real apex.
"""

import sys
from contextlib import contextmanager
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch

from engine.apex_adapter import ApexPrecision
from engine.errors import UserError
from engine.precision import Precision
from engine.run import create_precision
from optim import create_optimizer
from optim.lr_scheduler import create_schedule

CPU = torch.device("cpu")
FIRST_SCALE = 2.0**8  # apex begins at 2**16, where problems as small as these overflow


class StandIn:
    """apex.amp's documented functions for one model, one optimizer, dynamic loss scaling, opt_level O1 or O2."""

    def initialize(self, model, optimizer, opt_level, verbosity):
        self.scale, self.unskipped, self.level, self.made = FIRST_SCALE, 0, opt_level, False
        self.model, self.optimizer, self.scaled = model, optimizer, False
        if opt_level == "O2":  # weights in half precision, masters in float32, made at the first zero_grad or backward
            model.half()
            amp, forward = self, model.forward
            model.forward = lambda inputs: forward(inputs.half()).float()
            zero_grad, step = optimizer.zero_grad, optimizer.step

            def make_masters_and_zero(self):  # takes no set_to_none, like apex's
                amp.make_masters()
                zero_grad()
                model.zero_grad()

            def step_and_copy(self):
                step()
                for weight, master in zip(model.parameters(), amp.master_params(optimizer), strict=True):
                    weight.data.copy_(master)

            optimizer.zero_grad = MethodType(make_masters_and_zero, optimizer)
            optimizer.step = MethodType(step_and_copy, optimizer)
        return model, optimizer

    def make_masters(self):
        if not self.made and self.level == "O2":
            (group,) = self.optimizer.param_groups
            group["params"] = [weight.detach().float().requires_grad_() for weight in group["params"]]
            self.made = True

    @contextmanager
    def scale_loss(self, loss, optimizer, delay_unscale=False):
        self.make_masters()
        assert not optimizer.__dict__.get("skips"), "a backward pass between an overflow and its skipped step"
        yield loss.float() * self.scale
        self.scaled = delay_unscale
        if delay_unscale:
            return
        pairs = list(zip(self.model.parameters(), self.master_params(optimizer), strict=True))
        overflow = not all(weight.grad.isfinite().all() for weight, _ in pairs)
        for weight, master in pairs:
            master.grad = weight.grad.float() / self.scale
        self.unskipped = 0 if overflow else self.unskipped + 1
        if overflow:
            self.scale /= 2
            step = optimizer.step

            def skip_step():
                optimizer.step, optimizer.skips = step, False

            optimizer.step, optimizer.skips = skip_step, True

    def master_params(self, optimizer):
        return (weight for group in optimizer.param_groups for weight in group["params"])

    def state_dict(self):
        return {"loss_scaler0": {"loss_scale": self.scale, "unskipped": self.unskipped}}

    def load_state_dict(self, state):
        self.scale, self.unskipped = state["loss_scaler0"].values()


class StandInParallel(torch.nn.Module):
    """apex.parallel.DistributedDataParallel on one rank."""

    def __init__(self, module, delay_allreduce=False):
        super().__init__()
        self.module, self.delay_allreduce, self.reduces = module, delay_allreduce, True

    def enable_allreduce(self):
        self.reduces = True

    def disable_allreduce(self):
        self.reduces = False


@pytest.fixture
def apex(monkeypatch):
    amp = StandIn()
    package = ModuleType("apex")
    package.amp, package.parallel = amp, SimpleNamespace(DistributedDataParallel=StandInParallel)
    monkeypatch.setitem(sys.modules, "apex", package)
    return amp


def train(precision, state=None, updates=6, accumulation=2, poison=()):
    """The training loops' steps on a fixed problem. Returns the model, the losses and the state to resume from."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = create_optimizer("apollo", model.parameters(), lr=0.05, weight_decay=1e-3)
    model, optimizer = precision.prepare(model, optimizer)
    schedule = create_schedule(optimizer, "constant")
    first = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        precision.load_state_dict(state["precision"])
        first = state["update"]
    losses, taken = [], []
    for update in range(first, updates):
        inputs = torch.randn(accumulation, 16, 6, generator=torch.Generator().manual_seed(update))
        optimizer.zero_grad()
        for index, part in enumerate(inputs):
            with precision.autocast():
                loss = (model(part) - part[:, :3]).square().mean()
            losses.append(loss.item())
            factor = float("inf") if update in poison else 1.0
            precision.backward(factor * loss / accumulation, index == accumulation - 1)
        taken.append(precision.step(optimizer))
        if taken[-1]:
            schedule.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "precision": precision.state_dict()}
    return SimpleNamespace(model=model, losses=torch.tensor(losses), taken=taken, state=saved | {"update": updates})


def test_o1_takes_the_steps_of_full_precision(apex):
    """The stand-in does not cast at O1, and scales by powers of two. So the runs must agree to rounding."""
    ours, plain = train(ApexPrecision("apex-O1", CPU)), train(Precision("fp32", CPU))
    torch.testing.assert_close(ours.losses, plain.losses)
    assert ours.taken == plain.taken == [True] * 6


def test_o2_trains_half_precision_weights_with_float32_behind_them(apex):
    ours, plain = train(ApexPrecision("apex-O2", CPU)), train(Precision("fp32", CPU))
    torch.testing.assert_close(ours.losses, plain.losses, rtol=2e-2, atol=2e-2)
    assert {weight.dtype for weight in ours.model.parameters()} == {torch.float16}
    assert {weight.dtype for weight in ours.state["precision"]["masters"]} == {torch.float32}
    moments = [value for state in ours.state["optimizer"]["state"].values() for value in state.values()]
    assert {value.dtype for value in moments if torch.is_tensor(value)} == {torch.float32}


@pytest.mark.parametrize("name", ["apex-O1", "apex-O2"])
def test_overflow_skips_the_step_and_the_schedule(apex, name):
    ours = train(ApexPrecision(name, CPU), poison=(2, 3))
    assert ours.taken == [True, True, False, False, True, True]
    assert ours.state["precision"]["amp"]["loss_scaler0"]["loss_scale"] == FIRST_SCALE / 4
    assert ours.losses.isfinite().all()


@pytest.mark.parametrize("name", ["apex-O1", "apex-O2"])
def test_resumes_bit_for_bit_through_a_file(apex, name, tmp_path):
    whole = train(ApexPrecision(name, CPU), poison=(1,))
    half = train(ApexPrecision(name, CPU), poison=(1,), updates=3)
    torch.save(half.state, tmp_path / "state.pt")
    resumed = train(ApexPrecision(name, CPU), state=torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.losses, whole.losses[6:])
    for one, other in zip(resumed.state["precision"]["masters"], whole.state["precision"]["masters"], strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(tensor, whole.state["model"][key]) for key, tensor in resumed.state["model"].items())


def test_clips_the_float32_gradients(apex):
    precision = ApexPrecision("apex-O2", CPU)
    layer = torch.nn.Linear(4, 4)
    layer, optimizer = precision.prepare(layer, create_optimizer("sgd", layer.parameters(), lr=0.1))
    optimizer.zero_grad()
    precision.backward(layer(torch.ones(2, 4)).square().mean())
    before = precision.clip(optimizer, layer.parameters(), 0.01)
    after = torch.stack([weight.grad.norm() for weight in apex.master_params(optimizer)]).norm()
    assert before > 0.01
    assert after == pytest.approx(0.01, rel=1e-4)


def test_data_parallel_reduces_once_an_update(apex):
    network = ApexPrecision("apex-O1", CPU).data_parallel(torch.nn.Linear(2, 2), CPU)
    assert network.delay_allreduce and network.reduces
    with network.no_sync():
        assert not network.reduces
    assert network.reduces


def test_says_what_is_missing_and_what_to_use_instead(monkeypatch):
    cuda = torch.device("cuda", 0)
    for absent in (None, ModuleType("apex")):  # not installed; installed, but without amp: new, or the index's
        monkeypatch.setitem(sys.modules, "apex", absent)
        with pytest.raises(UserError, match=r"precision=apex-O1 needs .* 1896.* 23\.05.* precision=fp16"):
            create_precision("apex-O1", cuda, pytest.fail)
    with pytest.raises(UserError, match="precision=apex-O2 exists on CUDA devices only"):
        create_precision("apex-O2", CPU, pytest.fail)
    assert type(create_precision("fp32", CPU, pytest.fail)) is Precision
