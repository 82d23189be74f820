"""Apollo's own properties: settings and errors, its state, and that all paths take the same step on any memory."""

import copy
import math

import pytest
import torch
from golden_trajectories import APOLLO, follow, load
from optim_cases import PATHS, paths, variants
from optim_steps import random_parameters, step_together
from torch import nn

from optim import Apollo
from optim.apollo import apollo
from optim.apollo_reference import LiteralApollo
from optim.published import from_published, to_published
from optim.settings import Settings
from optim.step_tensors import StepTensors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be a finite number >= 0, got -0.1"),
        ({"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"lr": "0.1"}, "lr must be a finite number >= 0, got '0.1'"),
        ({"lr": torch.ones(2)}, "lr as a tensor must have 1 element"),
        ({"lr": 1.0, "beta": 1.0}, "beta must be a finite number in [0, 1)"),
        ({"lr": 1.0, "eps": 0.0}, "eps must be a finite number > 0"),
        ({"lr": 1.0, "sigma": math.inf}, "sigma must be a finite number > 0"),
        ({"lr": 1.0, "warmup": 1.5}, "warmup must be a finite number >= 0 and whole, got 1.5"),
        ({"lr": 1.0, "init_lr": -1}, "init_lr must be a finite number >= 0"),
        ({"lr": 1.0, "weight_decay": -1}, "weight_decay must be a finite number >= 0"),
        ({"lr": 1.0, "weight_decay_type": "l2"}, "unknown weight_decay_type 'l2'; did you mean 'L2'? valid: L2,"),
        ({"lr": 1.0, "rebound": "believe"}, "unknown rebound 'believe'; did you mean 'belief'?"),
        ({"lr": 1.0, "foreach": True, "fused": True}, "foreach and fused cannot both be True"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError) as error:
        Apollo(random_parameters(), **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError):  # in a group of its own too
        Apollo([{"params": random_parameters(), **settings}], lr=1.0)


@paths
def test_sparse_and_complex_gradients_are_refused_by_name(path):
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not take sparse gradients: parameter 'table\.weight' has one"):
        Apollo([("table.weight", embedding.weight)], lr=1.0, **path).step()
    with pytest.raises(RuntimeError, match=r"sparse gradients: the parameter of shape \(4, 3\), number 0 of its group"):
        Apollo(embedding.parameters(), lr=1.0, **path).step()
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="complex gradients"):
        Apollo([param], lr=1.0, **path).step()


@paths
@variants
def test_every_path_is_the_literal_one(path, variant):
    settings = {"warmup": 4, **variant}
    literal, params = random_parameters(dtype=torch.float64), random_parameters(dtype=torch.float64)
    step_together((LiteralApollo(literal, **settings), literal), (Apollo(params, **settings, **path), params), steps=8)
    for x, y in zip(literal, params, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@variants
def test_state_bytes(variant):
    """8 bytes per float32 parameter; 12 only with decoupled decay, which hides the average in the direction."""
    params = random_parameters()
    optimizer = Apollo(params, **variant)
    step_together((optimizer, params), steps=2)
    bytes_each = 12 if variant.get("weight_decay_type") in ("decoupled", "stable") else 8
    for param in params:
        tensors = [x for x in optimizer.state[param].values() if x.numel() > 1]
        assert sum(x.nbytes for x in tensors) == bytes_each * param.numel()


@paths
@pytest.mark.parametrize("decay", ["decoupled", "stable"])
@pytest.mark.parametrize("rebound", ["constant", "belief"])
def test_weight_decay_may_come_and_go(path, decay, rebound):
    """The average is stored from the moment when it must be, and is correct at once."""
    settings = {"lr": 0.01, "warmup": 0, "weight_decay_type": decay, "rebound": rebound}
    literal, params = random_parameters(dtype=torch.float64), random_parameters(dtype=torch.float64)
    pairs = (LiteralApollo(literal, **settings), literal), (Apollo(params, **settings, **path), params)
    for weight_decay in (0.0, 0.02, 0.0, 0.01):
        for optimizer, _ in pairs:
            optimizer.param_groups[0]["weight_decay"] = weight_decay
        step_together(*pairs, steps=3)
    for x, y in zip(literal, params, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_state(path, dtype):
    """The step is the float32 step of the same gradients, rounded once. It stays so after a reload."""
    settings = {"lr": 0.1, "warmup": 0, "weight_decay": 1e-3, **path}
    params = random_parameters(dtype=dtype)
    optimizer = Apollo(params, **settings)
    exact = [nn.Parameter(param.detach().float()) for param in params]
    reference = Apollo(exact, **{**settings, "fused": False, "foreach": False})
    for step in range(6):
        for param, twin in zip(params, exact, strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            twin.grad, twin.data = param.grad.float(), param.detach().float()
        if step == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Apollo(params, **settings)
            optimizer.load_state_dict(saved)
        optimizer.step(), reference.step()
        for param, twin in zip(params, exact, strict=True):
            torch.testing.assert_close(param, twin.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
            for key in ("direction", "hessian"):
                assert optimizer.state[param][key].dtype is torch.float32
                torch.testing.assert_close(optimizer.state[param][key], reference.state[twin][key])


def test_loading_respects_the_hooks_of_others():
    params = random_parameters(dtype=torch.bfloat16)
    optimizer = Apollo(params, lr=0.1)
    step_together((optimizer, params), steps=2)

    def double(_, state_dict):
        for state in state_dict["state"].values():
            state["hessian"] = state["hessian"] * 2
        return state_dict

    loaded = Apollo(params, lr=0.1)
    loaded.register_load_state_dict_pre_hook(double)
    expected = optimizer.state[params[0]]["hessian"] * 2
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(loaded.state[params[0]]["hessian"], expected)
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1


def layouts() -> dict[str, nn.Parameter]:
    buffer = torch.randn(50, generator=torch.Generator().manual_seed(3))
    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(4))
    return {
        "channels last": nn.Parameter(image.to(memory_format=torch.channels_last)),
        "transposed": nn.Parameter(buffer[:12].clone().view(3, 4).t()),
        "every other": nn.Parameter(buffer[12:32:2]),
        "one view": nn.Parameter(buffer[32:40]),
        "the next view": nn.Parameter(buffer[40:49]),
    }


@paths
@variants
def test_memory_layouts(path, variant):
    """Strided parameters and views of one storage step like contiguous ones, with any strides of the gradients."""
    strided = layouts()
    plain = {name: nn.Parameter(param.detach().double().contiguous()) for name, param in strided.items()}
    optimizers = Apollo(strided.values(), **variant, **path), LiteralApollo(plain.values(), **variant)
    for step in range(5):
        draw = torch.Generator().manual_seed(step)
        for name, param in strided.items():
            grad = torch.randn(param.shape, generator=draw)
            param.grad, plain[name].grad = (grad if step % 2 else torch.empty_like(param).copy_(grad)), grad.double()
        for optimizer in optimizers:
            optimizer.step()
    for name, param in strided.items():
        torch.testing.assert_close(param.detach().double(), plain[name].detach(), rtol=1e-4, atol=1e-5)


@paths
def test_gradients_of_another_dtype(path):
    """They get a separate list, because the fused kernel does not take them."""
    param, grad = random_parameters(((4, 3),), torch.bfloat16)[0], torch.randn(4, 3)
    expected = param.detach() - grad * 0.1
    settings = Settings.of(Apollo([param], lr=0.1, warmup=0, **path).defaults)
    hessian, direction, step = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(())
    with torch.no_grad():
        apollo(StepTensors([param], [grad], [None], [hessian], [direction], [None], [step]), settings)
    torch.testing.assert_close(direction, grad)
    torch.testing.assert_close(param.detach(), expected.bfloat16(), rtol=2**-8, atol=0)


@paths
def test_what_is_not_finite_spreads_over_its_tensor(path):
    """Also to elements with zero gradient and direction. The fused step must not skip these."""
    grad = torch.zeros(2000)
    grad[:3] = torch.tensor([1.0, math.inf, 1.0])
    params = [nn.Parameter(torch.ones(2000)), nn.Parameter(torch.ones(2000))]
    optimizer = Apollo(params, lr=0.1, warmup=0, **path)
    for first, second in ((grad, torch.ones(2000)), (torch.zeros(2000), torch.ones(2000))):
        params[0].grad, params[1].grad = first, second
        optimizer.step()
    assert params[0].isnan().all() and params[1].isfinite().all()


def test_in_place_writes_are_seen_by_autograd():
    for path in PATHS.values():
        weight = nn.Parameter(torch.ones(3))
        loss = (weight * weight).sum()
        weight.grad = torch.ones(3)
        Apollo([weight], lr=0.1, **path).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@paths
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler(path, unscale):
    """Scaled gradients step like unscaled ones. A step with an infinity in a gradient advances nothing."""
    scaled, plain = random_parameters(), random_parameters()
    settings = {"lr": 0.1, "warmup": 3, "weight_decay": 1e-3, "rebound": "belief", **path}
    optimizer, reference = Apollo(scaled, **settings), Apollo(plain, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        draw = torch.Generator().manual_seed(step)
        grads = [torch.randn(param.shape, generator=draw) for param in scaled]
        if step in (0, 3):
            grads[1][0] = math.inf
        before = copy.deepcopy([*scaled, *(x for param in scaled for x in optimizer.state[param].values())])
        optimizer.zero_grad()
        loss = sum((param * grad).sum() for param, grad in zip(scaled, grads, strict=True))
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step in (0, 3):
            after = [*scaled, *(x for param in scaled for x in optimizer.state[param].values())]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=False))
            assert all(optimizer.state[param]["step"] == max(step - 1, 0) for param in scaled)
        else:
            for param, grad in zip(plain, grads, strict=True):
                param.grad = grad
            reference.step()
    for x, y in zip(scaled, plain, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("foreach", [False, True])
def test_compiles_whole(monkeypatch, foreach):
    """With capturable=True torch.compile makes one graph of the step. It does not compile again at the next step.

    Whether CUDA is capturing is not asked then. The compiler could not follow that question.
    """
    monkeypatch.setattr("optim.apollo._is_capturing", torch._dynamo.graph_break)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, eager = random_parameters(((3, 2), (4,))), random_parameters(((3, 2), (4,)))
    settings = {"lr": torch.tensor(0.5), "warmup": 2, "weight_decay": 1e-3, "foreach": foreach, "capturable": True}
    optimizers = Apollo(compiled, **settings), Apollo(eager, **settings)
    step_together((optimizers[0], compiled), (optimizers[1], eager), steps=1)  # makes the state
    torch.compiler.reset()
    optimizers[0].step = torch.compile(optimizers[0].step, backend=backend, fullgraph=True)
    step_together((optimizers[0], compiled), (optimizers[1], eager), steps=4)
    assert len(graphs) == 1
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y)


def published(optimizer: LiteralApollo, params) -> dict:
    names = {"exp_avg": "exp_avg_grad", "hessian": "approx_hessian", "direction": "update", "step": "step"}
    state_dict = copy.deepcopy(optimizer.state_dict())
    state = {i: {names[key]: value for key, value in x.items()} for i, x in state_dict["state"].items()}
    groups = [
        {k: v for k, v in group.items() if k not in ("sigma", "maximize")} for group in state_dict["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("name", APOLLO)
def test_published_checkpoints(name):
    """The published optimizer begins a golden trajectory, this one continues it, and the published one ends it."""
    golden = load(name)

    class Relay(torch.optim.Optimizer):
        def __init__(self, params):
            self.literal, self.steps = LiteralApollo(params, **golden.settings), 0
            self.param_groups, self.params = self.literal.param_groups, params

        def step(self):
            if self.steps == 30:
                self.apollo = Apollo(self.params, **golden.settings)
                state = from_published(published(self.literal, self.params), sigma=golden.settings["sigma"])
                self.apollo.load_state_dict(state)
                self.param_groups = self.apollo.param_groups
            if self.steps == 50:
                old = to_published(self.apollo.state_dict())
                self.literal = LiteralApollo(self.params, **golden.settings)
                for i, param in enumerate(self.params):
                    x = old["state"][i]
                    self.literal.state[param] = {"step": x["step"], "exp_avg": x["exp_avg_grad"]}
                    self.literal.state[param] |= {"hessian": x["approx_hessian"], "direction": x["update"]}
                self.param_groups = self.literal.param_groups
            (self.apollo if 30 <= self.steps < 50 else self.literal).step()
            self.steps += 1

    trajectory = follow(golden, Relay)
    assert abs(trajectory - golden.params).max() < 1e-10


def test_published_checkpoints_are_checked():
    params = random_parameters()
    adam = torch.optim.Adam(params)
    step_together((adam, params), steps=1)
    with pytest.raises(ValueError, match="needs sigma"):
        from_published(adam.state_dict())
    with pytest.raises(ValueError, match="parameter 0 has no approx_hessian, exp_avg_grad, update"):
        from_published(adam.state_dict(), sigma=1.0)
    with pytest.raises(ValueError, match="no state or no param_groups"):
        from_published({}, sigma=1.0)


def test_loaded_settings_are_checked():
    optimizer = Apollo(random_parameters(), lr=0.1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["sigma"] = -1.0
    with pytest.raises(ValueError, match="sigma must be a finite number > 0, got -1.0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["sigma"] == 1.0


@pytest.mark.parametrize(("warmup", "capturable"), [(0, False), (5, False), (0, True), (5, True)])
def test_own_warmup(warmup, capturable):
    """A parameter with direction 1 shows the learning rates: B = 0 and m = 1 while gradients are 1 and d is tiny."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    settings = {"warmup": warmup, "init_lr": 0.1, "foreach": False, "capturable": capturable}
    optimizer = Apollo([param], lr=0.5, sigma=1e9, eps=1e9, **settings)
    taken = []
    for _ in range(8):
        before = param.item()
        param.grad = torch.full((1,), 1e9, dtype=torch.float64)
        optimizer.step()
        taken.append(before - param.item())
    assert taken == pytest.approx([0.1 + 0.4 * t / warmup if t < warmup else 0.5 for t in range(8)])


@pytest.mark.parametrize("rebound", ["constant", "belief"])
def test_the_share_of_clamped_entries(rebound):
    params = random_parameters()
    torch.manual_seed(0)
    optimizer = Apollo(params, lr=0.1, sigma=1e-3, rebound=rebound)
    assert optimizer.clamped() is None
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    below = total = 0
    for param in params:
        state = optimizer.state[param]
        bound = float(state["sigma"]) if rebound == "belief" else 1e-3
        below += sum(abs(b) < bound for b in state["hessian"].flatten().tolist())
        total += param.numel()
    assert 0 < below < total
    assert optimizer.clamped() == pytest.approx(below / total)


@pytest.mark.parametrize(("decay_type", "decay_factor"), [("L2", 1), ("stable", 1), ("decoupled", 100)])
def test_only_the_ratio_of_rate_and_sigma_matters(decay_type, decay_factor):
    """docs/apollo.md: with a hundredth of sigma, B is a hundredth and d a hundred times as large."""

    def train(factor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        inputs, targets = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
        settings = {"sigma": factor, "warmup": 10, "init_lr": 0.01 * factor, "weight_decay_type": decay_type}
        decay = 0.01 if factor == 1 else 0.01 * decay_factor
        optimizer = Apollo(model.parameters(), lr=0.3 * factor, weight_decay=decay, **settings)
        for _ in range(60):
            optimizer.zero_grad()
            (20 * nn.functional.mse_loss(model(inputs), targets)).backward()
            optimizer.step()
        assert 0 < optimizer.clamped() < 1  # both kinds of entries
        curvature = [optimizer.state[param]["hessian"] / factor for param in model.parameters()]
        return [param.detach() for param in model.parameters()], curvature

    torch.testing.assert_close(train(0.01), train(1.0), rtol=1e-6, atol=1e-8)


def test_curvature_has_the_rate_as_its_unit():
    """docs/apollo.md: on h p^2 / 2 the first B is lr h / (1 + beta)."""
    for lr in (0.01, 0.1):
        param = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = LiteralApollo([param], lr=lr, beta=0.9, eps=1e-12, warmup=0)
        for _ in range(2):
            optimizer.zero_grad()
            (4 * param.square() / 2).sum().backward()
            optimizer.step()
        assert optimizer.state[param]["hessian"].item() == pytest.approx(lr * 4 / 1.9)
