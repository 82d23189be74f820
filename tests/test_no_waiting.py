"""Between two log lines the host never waits for the device, in any of the three training loops.

The loops train on the meta device. Its tensors have no data, so an error is raised where the host wants to read some:
item(), bool(), tolist(), a copy to the CPU, and operations whose result's size depends on data. Host tensors can be
read as always. The code takes its branches for GPUs, since the device is not the CPU.
"""

from contextlib import nullcontext, suppress
from pathlib import Path

import nmt_cell
import pytest
import test_classification_train
import test_lm_train
import torch
from tqdm import tqdm

import classification.train
import engine.run
import language_model.train
import nmt.loss
import nmt.train
from engine.config import load_config
from engine.distributed import World, setup
from engine.precision import Precision
from engine.run_record import RunRecord

TASKS = ["classification", "language_model", "nmt"]
UPDATES = 12
OPTIMIZERS = ["{name: sgd, lr: 0.1, momentum: 0.9}", "{name: apollo, lr: 0.1, weight_decay: 0.01}"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, tuple[object, Path]]:
    """The module of each task, and a config for it."""
    folder = nmt_cell.make_cell(tmp_path_factory.mktemp("nmt"))
    for name, text in (("images", test_classification_train.CONFIG), ("text", test_lm_train.CONFIG)):
        (folder / f"{name}.yaml").write_text(text)
    return {
        "classification": (classification.train, folder / "images.yaml"),
        "language_model": (language_model.train, folder / "text.yaml"),
        "nmt": (nmt.train, folder / "cell.yaml"),
    }


@pytest.fixture
def on_meta(monkeypatch) -> World:
    """A world on the meta device, with what GPUs have and it lacks: autocast (off), pinned memory, a size of blocks."""
    monkeypatch.setattr(engine.run, "create_precision", lambda *_: Precision("fp32", torch.device("cpu")))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setitem(nmt.loss.BLOCK_ELEMENTS, "meta", nmt.loss.BLOCK_ELEMENTS["cuda"])
    return World(0, 1, 0, torch.device("meta"))


class Enough(Exception):
    """So many updates have been taken."""


def train(configs, monkeypatch, world: World, folder: Path, task: str, *overrides: str) -> None:
    """Train the task for UPDATES updates, or until the host waits for the device, which raises an error."""
    module, path = configs[task]
    seldom = ["checkpoint.minutes=60", *(["average.every=1000", "validate_every=1000"] if task == "nmt" else [])]
    config = load_config(module.Config, path, [f"run_dir={folder}", "log_every=1000", *seldom, *overrides])
    end_update = engine.run.end_update

    def counted(run, bar, again):
        wish = end_update(run, bar, again)
        if world.device.type == "cuda" and run.progress.update == 3:  # kernels are built, and the step was timed
            torch.cuda.set_sync_debug_mode("error")
        if run.progress.update == UPDATES:
            raise Enough
        return wish

    monkeypatch.setattr(engine.run, "end_update", counted)
    run = module.prepare(config, world, RunRecord(config, config.folder, world))
    with tqdm(disable=True) as bar, suppress(Enough):
        try:
            module.train_epoch(run, bar)
        finally:
            if world.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_nothing_waits_between_two_log_lines(configs, on_meta, monkeypatch, tmp_path, task, optimizer):
    train(configs, monkeypatch, on_meta, tmp_path / "run", task, f"optimizer={optimizer}")


@pytest.mark.parametrize("task", TASKS)
def test_a_log_line_waits(configs, on_meta, monkeypatch, tmp_path, task):
    """So a wait is noticed."""
    with pytest.raises(RuntimeError) as error:
        train(configs, monkeypatch, on_meta, tmp_path / "run", task, "log_every=5")
    assert "reduce" in [entry.name for entry in error.traceback]  # of engine.metrics.Sums


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_waits_on_a_gpu(configs, monkeypatch, tmp_path, task, precision):
    settings = [f"optimizer={OPTIMIZERS[1]}", f"precision={precision}"]
    settings += ["average={decay: 0.9}"] if task != "nmt" else []
    train(configs, monkeypatch, setup("cuda"), tmp_path / "run", task, *settings)
