"""Seeds, metrics, precision, checkpoints: the common parts of the training loops."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.run as engine_run
from engine.allocator import populate
from engine.checkpoint import Checkpoints, Progress, read_checkpoint, write_checkpoint
from engine.clipping import ClippingWatch
from engine.config import Named, OptimizerConfig, RunConfig
from engine.distributed import World, setup
from engine.errors import UserError
from engine.metrics import Sums, require_finite, require_finite_weights
from engine.precision import Precision
from engine.run import read_arguments
from engine.seed import derive, generator, seed_step
from optim import create_optimizer

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


def test_derive_is_stable_and_tells_places_apart():
    assert derive(1, "step", 2, 0) == 5196810439659286952  # a change would silently change every run ever recorded
    places = [(1,), (1, 2), (12,), (1, "2"), (1, 2, 0), (1, 0, 2), ("1", 2)]
    assert len({derive(*place) for place in places}) == len(places)
    assert all(0 <= derive(seed, "x") < 2**63 for seed in range(100))


def test_generators_and_step_seeds_repeat():
    first, again, other = (torch.rand(4, generator=generator(3, "e", epoch)) for epoch in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seed_step(5, 1)
    first = torch.nn.functional.dropout(torch.ones(100))
    torch.rand(7)
    seed_step(5, 1)
    assert torch.equal(first, torch.nn.functional.dropout(torch.ones(100)))


def test_sums():
    sums = Sums(("loss", "count"), CPU)
    sums.add(loss=torch.tensor(1.5), count=2)
    sums.add(loss=2.5)
    sums.add(count=torch.tensor(3))
    with pytest.raises(KeyError, match="no sums of counts"):
        sums.add(counts=1)
    assert sums.reduce(ALONE) == {"loss": 4.0, "count": 5.0}
    saved = sums.gather(ALONE)
    sums.zero()
    sums.scatter(saved, ALONE)
    assert sums.reduce(ALONE) == {"loss": 4.0, "count": 5.0}
    sums.scatter(torch.ones(3, 2), ALONE)  # saved by three ranks
    assert sums.reduce(ALONE) == {"loss": 3.0, "count": 3.0}


@pytest.mark.parametrize(("clipped", "said"), [(95, 1), (85, 0)])
def test_a_share_of_clipped_updates_near_one_is_said_once(clipped, said):
    """Log lines of 100 updates on two ranks. All updates of the warmup are clipped, and they do not count."""
    lines = []
    schedule = Named(name="milestone", warmup_updates=250)
    watch = ClippingWatch(Named(name="apollo", lr=1.0), schedule, lines.append)
    for update in range(100, 1300, 100):
        share = 100 if update <= 300 else clipped
        assert watch.share({"clipped": 2 * share, "updates": 200}, update, world_size=2) == share / 100
        assert len(lines) == (said if update >= 800 else 0)  # the five intervals from 301 to 800
    assert all(line.startswith("warning: 95% of the last 500 updates clipped") for line in lines)


def test_weights_that_are_not_finite_are_refused():
    model = torch.nn.BatchNorm1d(3)
    require_finite_weights(model, ALONE, update=3)
    model.running_var[1] = float("inf")
    with pytest.raises(UserError, match="running_var holds weights that are not finite at update 3"):
        require_finite_weights(model, ALONE, update=3)


def test_a_loss_that_is_not_finite_is_refused():
    require_finite(1.0, update=3)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"at update 3.*lower optimizer\.lr"):
            require_finite(loss, update=3)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precisions_train_on_one_path(name, dtype):
    torch.manual_seed(0)  # weights whose gradients, times the first scale, do not overflow
    precision = Precision(name, CPU)
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    with precision.autocast():
        out = layer(torch.ones(2, 4))
    assert out.dtype == dtype
    precision.backward(out.float().square().mean())
    precision.clip(optimizer, layer.parameters(), 0.5)
    assert torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in layer.parameters()])) <= 0.5 + 1e-4
    assert precision.step(optimizer)
    assert layer.weight.dtype == torch.float32 and not torch.equal(layer.weight, before)


def test_an_overflowing_fp16_step_advances_nothing():
    precision = Precision("fp16", CPU)
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    scale = precision.scaler.get_scale()
    precision.backward(layer(torch.ones(2, 4)).sum() * float("inf"))
    assert not precision.step(optimizer)
    assert torch.equal(layer.weight, before) and not optimizer.state
    assert precision.scaler.get_scale() < scale


def test_tf32_needs_cuda():
    with pytest.raises(UserError, match="tf32"):
        Precision("tf32", CPU)


def test_without_a_config_the_usage_is_printed(capsys):
    for arguments, status in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as exit:
            read_arguments(RunConfig, arguments, "usage: this way")
        assert exit.value.code == status and capsys.readouterr().out == "usage: this way\n"


def test_the_ranks_must_divide_the_passes():
    for ranks, passes in ((1, 1), (1, 7), (2, 8), (8, 8)):
        World(0, ranks, 0, CPU).require_divisible(32, passes)
    for ranks, batch, passes, other in (
        (2, 128, 1, "batch=64 passes=2 is an update of the same size"),
        (3, 32, 8, "start fewer"),
        (6, 30, 4, "batch=10 passes=12 is an update of the same size"),
        (16, 32, 8, "batch=16 passes=16 is an update of the same size"),
    ):
        with pytest.raises(UserError, match=f"^passes={passes} cannot be divided among {ranks} ranks; {other}$"):
            World(0, ranks, 0, CPU).require_divisible(batch, passes)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("WORLD_SIZE=", "WORLD_SIZE='', where a whole number of 1 or more belongs"),
        ("WORLD_SIZE=two", "WORLD_SIZE='two'"),
        ("WORLD_SIZE=2", "WORLD_SIZE=2 and no RANK nor MASTER_ADDR nor MASTER_PORT: start with torchrun"),
        ("WORLD_SIZE=2 RANK=0", "WORLD_SIZE=2 and no MASTER_ADDR nor MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=2 MASTER_ADDR=here MASTER_PORT=1", "RANK='2', where a whole number from 0 to 1 belongs"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=here MASTER_PORT=x", "MASTER_PORT='x'"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=no.such.host.invalid MASTER_PORT=1", "names no host: "),
        ("LOCAL_RANK=-1", "LOCAL_RANK='-1'"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, environment, words):
    for pair in environment.split():
        monkeypatch.setenv(*pair.split("="))
    with pytest.raises(UserError) as error:
        setup("cpu")
    assert words in str(error.value)


def test_asking_for_a_gpu_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device=cuda"):
            setup("cuda")


def _state(value: float) -> dict:
    return {"w": torch.full((1000,), value), "n": int(value)}


def _values(folder: Path) -> list[int]:
    return sorted(int(torch.load(path, weights_only=True)["n"]) for path in folder.glob("checkpoint*.pt"))


def test_the_last_few_checkpoints_are_kept(tmp_path):
    for value in range(5):
        write_checkpoint(tmp_path, _state(value), keep=3)
    assert _values(tmp_path) == [2, 3, 4]
    assert read_checkpoint(tmp_path, say=pytest.fail)["n"] == 4
    assert not list(tmp_path.glob("*.tmp"))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _of_another_program(path: Path) -> None:
    torch.save(_state(3), path)


@pytest.mark.parametrize("damage", [_truncate, _empty, _of_another_program])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(tmp_path, damage):
    for value in (1, 2):
        write_checkpoint(tmp_path, _state(value), keep=2)
    damage(tmp_path / "checkpoint.pt")
    said = []
    assert read_checkpoint(tmp_path, said.append)["n"] == 1
    assert len(said) == 1 and "checkpoint.pt is damaged" in said[0] and "checkpoint.1.pt" in said[0]
    damage(tmp_path / "checkpoint.1.pt")
    with pytest.raises(UserError, match="no older one is left"):
        read_checkpoint(tmp_path, said.append)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    write_checkpoint(tmp_path, _state(1), keep=1)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["n"] == 1  # any program can read it
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match="checkpoint.pt is damaged"):
            read_checkpoint(tmp_path, pytest.fail)


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(tmp_path):
    """After the next save, a kill between the renames would leave nothing whole."""
    said, model = [], torch.nn.Linear(2, 3)
    checkpoints = Checkpoints(tmp_path, {"model": model}, ALONE, keep=2, minutes=10, say=said.append)
    for update in (1, 2):
        checkpoints.save(Progress(update=update))
    (tmp_path / "checkpoint.2x.pt").touch()  # somebody's own
    _truncate(tmp_path / "checkpoint.pt")
    progress = Progress()
    checkpoints.restore(progress)
    assert progress.update == 1 and len(said) == 1
    checkpoints.save(Progress(update=3))
    kept = {path.name: torch.load(path, weights_only=True)["progress"]["update"] for path in tmp_path.glob("*[1t].pt")}
    assert kept == {"checkpoint.pt": 3, "checkpoint.1.pt": 1} and (tmp_path / "checkpoint.damaged").exists()


def test_saves_between_evaluations_take_a_hundredth_of_the_time(tmp_path):
    checkpoints = _checkpoints(tmp_path, torch.nn.Linear(2, 3))
    checkpoints.saved_at -= 700
    assert checkpoints.due()
    checkpoints.took_s = 8.0  # on a slow disk: not before 800 s
    assert not checkpoints.due()
    checkpoints.minutes = 0
    assert checkpoints.due()


def test_killed_between_the_two_renames(tmp_path):
    for value in (1, 2):
        write_checkpoint(tmp_path, _state(value), keep=2)
    os.replace(tmp_path / "checkpoint.pt", tmp_path / "checkpoint.1.pt")
    assert read_checkpoint(tmp_path, say=pytest.fail)["n"] == 2


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    write_checkpoint(tmp_path, {"n": Evil()}, keep=1)
    with pytest.raises(UserError, match="more than tensors and plain values"):
        read_checkpoint(tmp_path, say=pytest.fail)
    assert not (tmp_path / "ran").exists()


def _checkpoints(folder: Path, model: torch.nn.Module) -> Checkpoints:
    return Checkpoints(folder, {"model": model}, ALONE, keep=2, minutes=10, say=pytest.fail)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    _checkpoints(tmp_path, torch.nn.Linear(2, 3)).save(Progress())
    for other in (torch.nn.Linear(2, 4), torch.nn.Sequential(torch.nn.Linear(2, 3)), torch.nn.Linear(2, 3, bias=False)):
        with pytest.raises(UserError, match="belongs to another model"):
            _checkpoints(tmp_path, other).restore(Progress())


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    progress = Progress()
    progress.epoch_s = 1.0  # a value that this version does not know
    _checkpoints(tmp_path, torch.nn.Linear(2, 3)).save(progress)
    with pytest.raises(UserError, match="another version of this program"):
        _checkpoints(tmp_path, torch.nn.Linear(2, 3)).restore(Progress())


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files acts as the full disk: the write fails in the same way, in the middle."""
    import resource
    import signal

    write_checkpoint(tmp_path, _state(1), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(UserError, match=r"cannot save a checkpoint: File too large.*untouched"):
            write_checkpoint(tmp_path, _state(2), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert _values(tmp_path) == [1] and not list(tmp_path.glob("*.tmp"))
    write_checkpoint(tmp_path, _state(3), keep=2)
    assert _values(tmp_path) == [1, 3]


def test_freed_memory_is_kept():
    """Counts page faults of a step that allocates and frees 64 MiB. The setting stays, so it has its own process."""
    program = """if True:
        import resource, torch
        from engine.allocator import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5): torch.zeros(16, 2**20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults()
        print(faults(), keep_freed_memory(), min(faults() for _ in range(4)))
    """
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, done, after = out.split()
    if done == "True":  # glibc
        assert int(after) < int(before) / 100


def test_populate_provides_the_pages_at_once():
    storage = torch.UntypedStorage._new_shared(2**24)
    if not populate(storage.data_ptr(), storage.nbytes()):
        pytest.skip("this system cannot")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    storage.fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100  # of 4,096 pages
    assert not populate(0, 4096)


@pytest.mark.parametrize("name", ["apollo", "adamw", "sgd"])
@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
def test_on_cuda_the_step_clips(name, max_norm):
    """It divides what it reads. A Precision that takes the CPU for CUDA shows it; the next step divides no more."""
    layers, norms = [torch.nn.Linear(4, 3) for _ in range(2)], []
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, device_type in zip(layers, ("cpu", "cuda"), strict=True):
        settings = {"lr": 0.1, "fused": True}
        optimizer = create_optimizer(name, layer.parameters(), **settings)
        precision = Precision("fp32", CPU)
        precision.device_type = device_type
        for factor in (1.0, 3.0):
            for parameter in layer.parameters():
                parameter.grad = factor * torch.linspace(-1, 2, parameter.numel()).view_as(parameter)
            norms.append(float(precision.clip(optimizer, layer.parameters(), max_norm)))
            clipped = device_type == "cuda" and layer.weight.grad[0, 0] == -factor
            assert clipped or device_type == "cpu"
            assert precision.step(optimizer)
            assert getattr(optimizer, "grad_scale", None) is None
        layer.weight.grad, layer.bias.grad = torch.ones(3, 4), None  # a step without clipping
        precision.step(optimizer)
    assert norms[:2] == pytest.approx(norms[2:])
    for ours, expected in zip(*(layer.parameters() for layer in reversed(layers)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_baselines_are_fused_on_cuda_unless_told_otherwise():
    def fused(device_type: str, **optimizer) -> bool | None:
        precision = SimpleNamespace(device_type=device_type, prepare=lambda *pair: pair)
        config = SimpleNamespace(optimizer=OptimizerConfig(lr=0.1, **optimizer))
        _, made = engine_run.with_optimizer(torch.nn.Linear(2, 2), config, precision)
        return made.param_groups[0].get("fused")

    for name in ("adam", "adamw", "sgd"):
        assert fused("cuda", name=name) is True
        assert not fused("cpu", name=name) and not fused("cuda", name=name, foreach=True)
    assert fused("cuda", name="radam") is None  # torch has no fused one
    assert fused("cuda", name="apollo") is None  # of itself it is fused where it can be


def test_training_time_ends_when_the_device_is_done(monkeypatch):
    """A made-up device needs three seconds more than the host. What follows `start_clock` is counted anew."""
    now = [10.0]
    monkeypatch.setattr(engine_run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    late = SimpleNamespace(synchronize=lambda: now.__setitem__(0, now[0] + 3.0))
    run = SimpleNamespace(world=late, progress=Progress(lr=torch.tensor(0.5)), clock=0.0)
    engine_run.start_clock(run)
    now[0] += 1.0  # the host has given the device all its work
    engine_run.wait_for_device(run)
    assert run.progress.since_evaluation_s == 4.0 and run.progress.lr == 0.5 and isinstance(run.progress.lr, float)
    now[0] += 100.0  # a checkpoint is written
    engine_run.start_clock(run)
    engine_run.wait_for_device(run)
    assert run.progress.since_evaluation_s == 7.0
