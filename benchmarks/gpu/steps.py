"""Are the steps of the Triton kernels right on a GPU? Against the single-tensor step, over all that they support.

Each case trains a few tensors with both forms on the same gradients; one is empty, one starts at an odd address.
`error` is the largest difference over the largest entry of parameters, directions and count; `bound` allows a few
roundings.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import optim.dispatch
from benchmarks.gpu.record import Part
from benchmarks.gpu.worker import Place
from classification.cuda_graph import RecordedStep
from optim import Apollo

# float32 holds this lr exactly, as the two forms may round it at different places.
PLAIN: dict[str, Any] = {"lr": 0.125, "warmup": 2, "init_lr": 0.01}
L2 = PLAIN | {"weight_decay": 0.1}
BELIEF = L2 | {"rebound": "belief"}
VARIANTS = {
    "plain": PLAIN,
    "L2": L2,
    "decoupled": L2 | {"weight_decay_type": "decoupled"},
    "stable": L2 | {"weight_decay_type": "stable"},
    "belief": BELIEF,
    "belief stable": BELIEF | {"weight_decay_type": "stable"},
    "maximize": L2 | {"maximize": True},
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
STEPS = 6


def check(part: Part, place: Place) -> None:
    with triton_on_the_cpu() if place.dry else nullcontext():
        require_triton(place.device)
        compare(part, place, "float32", [*VARIANTS])
        for name, case in {
            "GradScaler, two steps skipped": scaled,
            "the same bits when repeated": repeated,
            "the same bits with sums carried or taken anew": taken_anew,
            "the same bits from a CUDA graph": from_a_graph,
            "sharded by FSDP2, one rank": sharded,
        }.items():
            if case is sharded and place.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
                continue  # FSDP2 of torch 2.6 does not work on the CPU
            if part.has_time(name):
                part.add(name, **case(place))
        for dtype in ("bfloat16", "float16"):
            compare(part, place, dtype, ["stable"] if place.dry else ["L2", "decoupled", "stable", "belief"])
    if part.has_time("torch.compile of the step", 0 if place.dry else 40):
        part.add("torch.compile of the step", **compiled(place))


def compare(part: Part, place: Place, dtype: str, variants: list[str]) -> None:
    kind = getattr(torch, dtype)
    for name in variants:
        if part.has_time(f"{name}, {dtype}"):
            ours, theirs = (form(place, VARIANTS[name], kind) for form in (train, alone))
            part.add(f"{name}, {dtype}", **difference(ours, theirs, kind))


def parameters(place: Place, dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    sizes = (40, 5, 0, 18) if place.dry else (100_000, 16_384, 5, 0, 40_001)
    drawn = [torch.randn(size, generator=draw).to(place.device, dtype) for size in sizes]
    return [nn.Parameter(x) for x in (*drawn[:-1], drawn[-1][1:])]  # the last one at an odd address


def train(
    place: Place,
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    between: Callable[[], None] = lambda: None,
    step_of: Callable[[Apollo], Callable[[], Any]] = lambda optimizer: optimizer.step,
    rate: float | None = None,
    **form: Any,
) -> Tensor:
    """Parameters, directions and count after STEPS steps; `rate` is the last one's learning rate."""
    params = parameters(place, dtype)
    optimizer = Apollo(params, **settings, **({"fused": True} | form))
    step = step_of(optimizer)
    draw = torch.Generator().manual_seed(1)
    static = [torch.empty_like(param) for param in params]  # a graph reads its gradients where they were
    for number in range(STEPS):
        for param, grad in zip(params, static, strict=True):
            param.grad = grad.copy_(torch.randn(grad.shape, generator=draw).to(place.device, dtype))
        if rate is not None and number == STEPS - 1:
            optimizer.param_groups[0]["lr"] = rate
        step()
        between()
    states = [optimizer.state[param] for param in params]
    return flat([*params, *(state["direction"] for state in states), states[0]["step"]])


def alone(place: Place, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    """As `train`, by the single-tensor step."""
    return train(place, settings, dtype, fused=False, foreach=False, **more)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().cpu().view(-1) for x in tensors])


def difference(ours: Tensor, theirs: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return {"error": error, "bound": BOUNDS[dtype], "ok": error <= BOUNDS[dtype]}  # a NaN is not


def same_bits(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    return {"differing": int((ours != theirs).sum()), "of": len(ours), "ok": torch.equal(ours, theirs)}


def scaled(place: Place) -> dict[str, Any]:
    """torch's GradScaler leaves unscaling and skipping to the step."""

    def step_of(optimizer: Apollo) -> Callable[[], None]:
        scaler, number = torch.amp.GradScaler(place.device.type, init_scale=1024.0), iter(range(STEPS))

        def step() -> None:
            scaler.scale(torch.ones((), device=place.device))  # makes the scale
            overflows = next(number) in (0, 3)
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                param.grad *= scaler.get_scale()
                if overflows and param.numel():
                    param.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()

        return step

    return difference(train(place, BELIEF, step_of=step_of), alone(place, BELIEF, step_of=step_of))


def repeated(place: Place) -> dict[str, Any]:
    return same_bits(train(place, L2), train(place, L2))


def taken_anew(place: Place) -> dict[str, Any]:
    from optim.fused import cuda as fused_cuda

    return same_bits(train(place, L2, between=fused_cuda._carried._left.clear), train(place, L2))


def from_a_graph(place: Place) -> dict[str, Any]:
    """The learning rate changes after the capture; the eager step too takes it on the device."""
    ours = train(place, L2, step_of=lambda optimizer: RecordedStep(optimizer, place.device), rate=0.0625)
    return same_bits(ours, train(place, L2, rate=0.0625, carry_sums=False))


def sharded(place: Place) -> dict[str, Any]:
    """The kernels' path for shards, whose sums a collective over the ranks (here one) joins."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(shard: bool) -> Tensor:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(place.device)
        if shard:
            fully_shard(network, mesh=init_device_mesh(place.device.type, (1,)))
        optimizer = Apollo(network.parameters(), **VARIANTS["belief stable"], fused=shard, foreach=False)
        draw = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            network(torch.randn(8, 5, generator=draw).to(place.device)).square().mean().backward()
            optimizer.step()
        return flat([param.full_tensor() if shard else param for param in network.parameters()])

    expected = trained(shard=False)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if place.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            return difference(trained(shard=True), expected)
        finally:
            dist.destroy_process_group()


def compiled(place: Place) -> dict[str, Any]:
    backend = "aot_eager" if place.dry else "inductor"

    def step_of(optimizer: Apollo) -> Callable[[], None]:
        return torch.compile(lambda: optimizer.step(), backend=backend)

    given = L2 | {"lr": torch.tensor(L2["lr"], device=place.device)}
    form = {"fused": False, "foreach": False, "capturable": True}
    return difference(train(place, given, step_of=step_of, **form), train(place, given, **form))


def require_triton(device: torch.device) -> None:
    """RuntimeError where the fused step is not Triton's."""
    step = optim.dispatch.fused_step(device, torch.float32)
    if step is None or step.__module__ != "optim.fused.cuda":
        raise RuntimeError("Triton cannot launch kernels here: Apollo takes its foreach step (log.txt says why)")


@contextmanager
def triton_on_the_cpu() -> Iterator[None]:
    """Triton's interpreter, with several chunks for a toy tensor."""
    from optim.fused import cuda as fused_cuda

    step = fused_cuda._fused_cuda_apollo
    with (
        patch.multiple(fused_cuda, CHUNK=32, BLOCK=16, JOIN=1),
        patch.object(optim.dispatch, "fused_step", lambda device, dtype: step if dtype in fused_cuda.DTYPES else None),
    ):
        yield
