"""Updates in CUDA graphs, without a GPU: the same bits as the plain loop, over fixed tensors and from a recording."""

from pathlib import Path

import pytest
import torch
from graph_tape import stand_in
from torch import nn
from tqdm import tqdm

from classification import cuda_graph
from classification.config import Config
from classification.cuda_graph import RecordedStep, capturable, counted_together, uses_graph
from classification.native import norm_relu
from classification.train import ImageRun, prepare, train_epoch
from engine.config import load_config
from engine.distributed import World
from engine.errors import UserError
from engine.run_record import RunRecord
from optim import SGD, Adam, Apollo, RAdam, create_optimizer

CONFIG = """
table: digits
row: any
epochs: 2
batch: 64
data: {name: digits}
model: {name: resnet, depth: 8}
log_every: 4
optimizer: {name: apollo, lr: 0.5, weight_decay: 5.0e-4}
schedule: {name: milestone, milestones: [1], decay_rate: 0.3, warmup_updates: 7, init_lr: 0.01}
"""
UPDATES = 10
CPU = World(0, 1, 0, torch.device("cpu"))
SETTINGS = {
    "apollo": "{name: apollo, lr: 0.5, weight_decay: 5.0e-4}",
    "apollo foreach": "{name: apollo, lr: 0.5, weight_decay: 5.0e-4, foreach: true, capturable: true}",
    "sgd": "{name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4, fused: true}",
}


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "cell.yaml"
    path.write_text(CONFIG)
    return path


def trained(config: Path, *overrides: str, updates: int = UPDATES) -> ImageRun:
    """The end of the first epoch, `updates` long."""
    run_dir = config.parent / f"run{len(list(config.parent.iterdir()))}"
    resolved = load_config(Config, config, [f"run_dir={run_dir}", "device=cpu", *overrides])
    run = prepare(resolved, CPU, RunRecord(resolved, resolved.folder, CPU))
    run.progress.update_in_epoch = run.data.updates_per_epoch(64) - updates
    assert train_epoch(run, tqdm(disable=True))
    return run


def everything(run: ImageRun) -> list[torch.Tensor]:
    states = [x for state in run.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    sums = [torch.tensor(list(run.progress.since_evaluation.values()))]
    return [*run.model.state_dict().values(), *states, *sums]


def assert_equal(one: ImageRun, other: ImageRun) -> None:
    first, second = everything(one), everything(other)
    assert len(first) == len(second) and all(map(torch.equal, first, second))
    assert one.progress.lr == other.progress.lr > 0


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_over_fixed_tensors_it_is_the_plain_loop(config, monkeypatch, settings):
    plain = trained(config, f"optimizer={settings}")
    assert not isinstance(plain.take_step, RecordedStep), "on the CPU graphs are no default"
    monkeypatch.setattr(cuda_graph, "DEVICES", ("cuda", "cpu"))
    fixed = trained(config, f"optimizer={settings}", "graph=true")
    assert isinstance(fixed.take_step, RecordedStep)
    assert_equal(plain, fixed)
    assert [dict(group, params=0) for group in plain.optimizer.param_groups] == [
        dict(group, params=0) for group in fixed.optimizer.param_groups
    ], "settings of the capture have stayed"


@pytest.mark.parametrize("settings", [SETTINGS["apollo foreach"], SETTINGS["sgd"]])
def test_recorded_and_replayed_it_is_the_plain_loop(config, monkeypatch, settings):
    """The rate changes in each update, and so does the batch; a recording that keeps one of them shows."""
    monkeypatch.setattr(norm_relu, "library", lambda: None)  # native functions are not recorded
    plain = trained(config, f"optimizer={settings}")
    tapes = stand_in(monkeypatch)
    replayed = trained(config, f"optimizer={settings}")
    assert [tape.replays for tape in tapes] == [UPDATES - cuda_graph.WARMUP] * 2
    assert_equal(plain, replayed)


def test_what_reads_the_device_is_not_recorded(config, monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(cuda_graph, "capturable", lambda optimizer, rates: torch.no_grad())
    with pytest.raises(UserError, match="failed in update 4: .*a tensor's value is read"):
        trained(config, "optimizer={name: apollo, lr: 0.5, foreach: true}")


def test_batches_are_counted_in_one_operation(config, monkeypatch):
    monkeypatch.setattr(norm_relu, "library", lambda: None)
    tapes = stand_in(monkeypatch)
    run = trained(config, f"optimizer={SETTINGS['sgd']}", updates=5)
    norms = [module for module in run.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 9 and all(norm.num_batches_tracked == 5 for norm in norms)
    whole = [args for operator, args, *_ in tapes[0].operations if "int64" in str([x.dtype for x in tensors(args)])]
    counting = [args for args in whole if any(x is norms[0].num_batches_tracked for x in tensors(args))]
    assert len(counting) == 1 and len(tensors(counting[0])) == len(norms)
    frozen = nn.BatchNorm2d(2, momentum=None)  # averages over all batches: it needs its own count
    with counted_together(frozen):
        frozen(torch.ones(2, 2, 2, 2))
    assert frozen.num_batches_tracked == 1


def tensors(args: tuple) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_flatten(args)[0] if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("kind", [Apollo, Adam, SGD, RAdam])
def test_settings_of_a_capture(kind):
    """Where the rate is a tensor, Adam and RAdam must be capturable, and SGD fused. Then all is as it was."""
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    before, rate = dict(optimizer.param_groups[0]), torch.zeros(())
    with capturable(optimizer, [rate]):
        group = optimizer.param_groups[0]
        assert group["lr"] is rate and group["fused" if kind is SGD else "capturable"] is True
    assert optimizer.param_groups[0] == before


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        ([], 1, "device=cuda"),
        (["passes=2"], 1, "passes=2"),
        ([], 2, "a single rank, not 2"),
        (["precision=fp16"], 1, "not fp16"),
        (["optimizer={name: torch.optim.NAdam, lr: 0.1}"], 1, "Apollo, Adam, AdamW, SGD, RAdam"),
        (["optimizer={name: sgd, lr: 0.1, fused: false}"], 1, "fused=false"),
        (["optimizer={name: sgd, lr: 0.1, needs: closure}"], 1, "needs=closure"),
    ],
)
def test_refused_by_name(config, overrides, ranks, words):
    asked, unasked = (load_config(Config, config, [*overrides, *graph]) for graph in (["graph=true"], []))
    named = asked.optimizer
    optimizer = create_optimizer(named.name, [nn.Parameter(torch.ones(2))], **named.settings)
    device = torch.device("cpu" if words == "device=cuda" else "cuda")
    with pytest.raises(UserError, match="^graph=true needs ") as refused:
        uses_graph(asked, optimizer, device, ranks)
    assert words in str(refused.value) and "leave `graph` out" in str(refused.value)
    assert not uses_graph(unasked, optimizer, device, ranks)


def test_default_on_a_gpu(config):
    given, refused = (load_config(Config, config, graph) for graph in ([], ["graph=false"]))
    optimizer = Apollo([nn.Parameter(torch.ones(2))], lr=0.1)
    assert uses_graph(given, optimizer, torch.device("cuda"), 1)
    assert not uses_graph(refused, optimizer, torch.device("cuda"), 1)
