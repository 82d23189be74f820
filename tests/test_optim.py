"""Every optimizer of the table must keep the conventions of torch.optim, and solve a small problem."""

import copy
import io
import pickle
import sys

import pytest
import torch
from optim_cases import CASES
from torch import Tensor, nn

from optim import OPTIMIZERS, Apollo, create_optimizer
from optim.foreign import suggest

all_cases = pytest.mark.parametrize("case", CASES, ids=str)


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((5, 3), (7,), (2, 3, 4, 4), (1,), ())
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def set_grads(params: list[Tensor], step: int) -> None:
    """Set gradients of a quadratic, with noise that depends only on the step."""
    draw = torch.Generator().manual_seed(1000 + step)
    for param in params:
        noise = torch.randn(param.shape, generator=draw).to(param.dtype)
        param.grad = param.detach().clone().add_(noise, alpha=0.1)


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@all_cases
def test_converges(case):
    params = parameters()
    optimizer = case.make(params)
    before = sum(param.square().sum() for param in params)
    for _ in range(300):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    assert sum(param.square().sum() for param in params) < 0.02 * before


@all_cases
def test_repeats_itself(case):
    finals = []
    for _ in range(2):
        params = parameters()
        run(case.make(params), params, range(6))
        finals.append(params)
    assert equal(*finals)


@all_cases
def test_state_dict_round_trip(case):
    params = parameters()
    optimizer = case.make(params)
    run(optimizer, params, range(5))
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = case.make(copies, lr=123.0)

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))

    run(optimizer, params, range(5, 10))
    run(resumed, copies, range(5, 10))
    assert equal(params, copies)


@all_cases
def test_copy_and_pickle_go_on_alike(case):
    params = parameters()
    optimizer = case.make(params)
    run(optimizer, params, range(4))
    copied = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    for other in (optimizer, copied, pickled):
        run(other, other.param_groups[0]["params"], range(4, 8))
    assert equal(params, copied.param_groups[0]["params"])
    assert equal(params, pickled.param_groups[0]["params"])


@all_cases
def test_groups_are_independent(case):
    """Two groups, the second added later, step like two optimizers."""
    params, apart = parameters(), parameters()
    together = case.make([{"params": params[:2], "lr": 0.01}])
    together.add_param_group({"params": params[2:], "weight_decay": 0.05})
    first, second = case.make(apart[:2], lr=0.01), case.make(apart[2:], weight_decay=0.05)
    for step in range(5):
        for group in (params, apart):
            set_grads(group, step)
        together.step(), first.step(), second.step()
    for x, y in zip(params, apart, strict=True):
        torch.testing.assert_close(x, y)


@all_cases
def test_closure(case):
    params = parameters()
    optimizer = case.make(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert params[0].requires_grad and not first.isnan()


@all_cases
def test_parameters_without_gradient_stay(case):
    params = parameters()
    optimizer = case.make(params)
    for step in range(3):
        set_grads(params, step)
        params[1].grad = None
        optimizer.step()
    assert torch.equal(params[1], parameters()[1]) and params[1] not in optimizer.state
    assert not torch.equal(params[0], parameters()[0])
    case.make(parameters()).step()  # none at all


@all_cases
def test_empty_and_zero_gradients(case):
    params = [nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))]
    optimizer = case.make(params, weight_decay=0.0)
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert equal(params, before)
    assert all(
        x.isfinite().all() for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    )
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert params[1].isfinite().all() and not torch.equal(params[1], before[1])


@all_cases
def test_learning_rate_as_a_tensor(case):
    if case.name == "radam" or case.settings.get("foreach") or "NAdam" in case.name:
        case = case._replace(settings={**case.settings, "foreach": False})
    params, others = parameters(), parameters()
    lr = torch.tensor(case.settings["lr"])
    with_tensor, with_float = case.make(params, lr=lr), case.make(others)
    for step in range(6):
        if step == 3:
            lr.mul_(0.1)
            with_float.param_groups[0]["lr"] *= 0.1
        run(with_tensor, params, range(step, step + 1))
        run(with_float, others, range(step, step + 1))
    for x, y in zip(params, others, strict=True):
        torch.testing.assert_close(x, y)


@all_cases
def test_maximize_is_minimize_of_the_opposite(case):
    params, others = parameters(), parameters()
    ascent, descent = case.make(params, maximize=True), case.make(others)
    for step in range(5):
        set_grads(params, step)
        for x, y in zip(params, others, strict=True):
            y.grad = -x.grad
        ascent.step(), descent.step()
    assert equal(params, others)


@all_cases
def test_bfloat16(case):
    params = parameters(dtype=torch.bfloat16)
    run(case.make(params), params, range(20))
    assert all(param.dtype is torch.bfloat16 and param.isfinite().all() for param in params)
    assert not equal(params, parameters(dtype=torch.bfloat16))


def test_table_covers_what_is_exported():
    assert {case.name for case in CASES} >= set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("apolo", {}, "unknown optimizer 'apolo'; did you mean 'apollo'? valid: apollo, sgd, adam, adamw, radam"),
        ("apollo", {"lr": 1.0, "bta": 0.9}, "has no setting 'bta'; did you mean 'beta'? valid: lr, beta"),
        ("sgd", {"lr": 1.0, "momentun": 0.9}, "has no setting 'momentun'; did you mean 'momentum'?"),
        ("apollo", {}, "optimizer 'apollo' needs the setting 'lr'"),
        ("sgd", {"lr": -1.0}, "optimizer 'sgd': Invalid learning rate: -1.0"),
        ("sgd", {"lr": "0,1"}, "optimizer 'sgd': lr must be a number, got '0,1'"),
        ("sgd", {"lr": 0.1, "nesterov": "yes"}, "optimizer 'sgd': nesterov must be true or false, got 'yes'"),
        ("adam", {"lr": 0.1, "weight_decay": None}, "optimizer 'adam': weight_decay must be a number, got None"),
        ("adam", {"lr": 0.1, "betas": 0.9}, "optimizer 'adam': betas must be a list of 2 numbers, got 0.9"),
        ("adam", {"lr": 0.1, "betas": [0.9]}, "optimizer 'adam': betas must be a list of 2 numbers, got [0.9]"),
        ("torch.optim.NAdam", {"lr": "0,1"}, "its settings: {'lr': '0,1'}"),
        (".Optimizer", {"lr": 1.0}, "'.Optimizer' is no dotted path, package.module.Class"),
        ("nowhere.Optimizer", {"lr": 1.0}, "'nowhere.Optimizer' cannot be imported: ModuleNotFoundError"),
        ("torch.optim.Nothing", {"lr": 1.0}, "'torch.optim.Nothing' cannot be imported: torch.optim has no 'Nothing'"),
        ("torch.pi", {"lr": 1.0}, "'torch.pi' is not a class or function"),
    ],
)
def test_bad_names_and_settings(name, settings, message):
    with pytest.raises(ValueError) as error:
        create_optimizer(name, parameters(), **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_of_very_many_names_only_the_nearest_is_suggested():
    names = [f"Optimizer{number}" for number in range(100)]
    assert suggest("optimizer7", names) == "; did you mean 'Optimizer7'?" and suggest("zzz", names) == ""


def test_a_missing_package_of_optimizers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="needs the package pytorch_optimizer: pip install pytorch_optimizer"):
        create_optimizer("pytorch_optimizer.AdaBelief", parameters())


def test_warmup_belongs_to_the_schedule():
    assert create_optimizer("apollo", parameters(), lr=1.0).defaults["warmup"] == 0
    assert create_optimizer("apollo", parameters(), lr=1.0, warmup=5).defaults["warmup"] == 5
    assert Apollo(parameters(), lr=1.0).defaults["warmup"] == 100
