"""The training command on an ImageNet LMDB: interrupted and resumed, on two ranks, accumulated, with damaged images."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from imagenet_images import CLASSES, make_tree

from classification.imagenet.prepare import build
from classification.models import create_model

CONFIG = """
table: imagenet_small
row: apollo
epochs: 2
global_batch: 12
eval_batch: 5
data: {{name: imagenet, root: {root}, size: 32, workers: 1}}
model: {{name: resnet18}}
log_every: 1
optimizer: {{name: apollo, lr: 0.1, eps: 1.0e-4, weight_decay: 2.0e-4}}
schedule: {{name: cosine, last_lr: 1.0e-3, warmup_updates: 5, init_lr: 0.01}}
checkpoint: {{minutes: 0, keep: 2}}
"""
UPDATES = 2 * (60 // 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet_train")
    build(make_tree(folder / "tree", train=20, val=5), folder / "lmdb")
    (folder / "cell.yaml").write_text(CONFIG.format(root=folder / "lmdb"))
    return folder


def command(folder, name, *overrides, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    cell = [str(folder / "cell.yaml"), f"run_dir={folder / name}", *overrides]
    return [sys.executable, *launcher, "-m", "classification.train", *cell]


def run(*arguments, **settings):
    return subprocess.run(command(*arguments, **settings), capture_output=True, text=True, timeout=300)


def complete(folder, name, *overrides, **settings):
    done = run(folder, name, *overrides, **settings)
    assert done.returncode == 0, done.stderr
    return folder / name


def interrupted(folder, name, *overrides, number, group, at_update, **settings):
    """Send the signal (to the whole process group, or not) after so many updates; the exit status."""
    log = folder / name / "metrics.jsonl"
    process = subprocess.Popen(
        command(folder, name, *overrides, **settings), start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (not log.exists() or log.read_text().count("\n") < at_update) and time.monotonic() < deadline:
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, number)
    return process.wait(timeout=60)


def weights(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"]


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["kind"] == "train"])


def assert_same(one, other):
    assert torch.equal(losses(one), losses(other))
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module")
def accumulated(folder):
    return complete(folder, "accumulated", "accumulation=2")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return complete(folder, "two_ranks", ranks=2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_with_its_workers_and_resumed(folder, accumulated, number, status):
    """Ctrl-C reaches the whole process group; the workers must not take it for themselves."""
    name = f"interrupted_{status}"
    assert interrupted(folder, name, "accumulation=2", number=number, group=True, at_update=3) == status
    assert not (folder / name / "result.json").exists()
    assert_same(complete(folder, name, "accumulation=2", "data.workers=0"), accumulated)


def test_two_ranks_stopped_and_resumed(folder, two_ranks):
    assert interrupted(folder, "stopped", ranks=2, number=signal.SIGTERM, group=False, at_update=3) != 0
    assert not (folder / "stopped" / "result.json").exists()
    assert_same(complete(folder, "stopped", ranks=2), two_ranks)


def test_two_ranks_train_as_one_with_accumulation(two_ranks, accumulated):
    """BatchNorm sees 6 images at a time in both, so only the order of additions differs."""
    assert len(losses(two_ranks)) == UPDATES
    torch.testing.assert_close(losses(two_ranks), losses(accumulated), rtol=1e-3, atol=1e-4)
    recipes = [json.loads((path / "environment.json").read_text())["recipe"] for path in (two_ranks, accumulated)]
    assert [(recipe["world_size"], recipe["accumulation"]) for recipe in recipes] == [(2, 1), (1, 2)]
    assert [recipe["batchnorm_batch"] for recipe in recipes] == [6, 6]
    result = json.loads((two_ranks / "result.json").read_text())
    assert (result["evaluated"], result["complete"]) == (15, True)


def test_damaged_images_are_an_error_or_counted_in_the_record(folder):
    path = folder / "tree" / "train" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    build(folder / "tree", folder / "damaged")
    path.write_bytes(content)
    settings = (f"data.root={folder / 'damaged'}", "epochs=1")
    done = run(folder, "error", *settings)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: {folder}/damaged/train.lmdb, key 20 (class {CLASSES[1]}) cannot be decoded")
    assert "Traceback" not in done.stderr
    skipped = complete(folder, "skip", *settings, "data.on_damaged=skip")
    epoch = json.loads((skipped / "metrics.jsonl").read_text().splitlines()[-1])
    assert (epoch["kind"], epoch["damaged"]) == ("epoch", 1)


def test_run_is_not_continued_with_another_set_of_classes(folder, tmp_path, accumulated):
    tree = make_tree(tmp_path / "tree", train=8, val=1)
    for split in ("train", "val"):
        (tree / split / CLASSES[2]).rename(tmp_path / split)
    build(tree, tmp_path / "lmdb")
    result = accumulated / "result.json"
    content = result.read_text()
    result.unlink()
    done = run(folder, "accumulated", "accumulation=2", f"data.root={tmp_path / 'lmdb'}")
    result.write_text(content)
    assert done.returncode == 2
    assert "the checkpoint belongs to another model (fc.weight: (3, 512) there, (2, 512) here)" in done.stderr


def test_settings_of_imagenet_are_refused_elsewhere(folder):
    done = run(folder, "wrong", "data.name=digits")
    assert done.returncode == 2
    assert "data.size is a setting of data.name=imagenet alone" in done.stderr


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnext50_32x4d", 25_028_904)],
)
def test_models_are_torchvisions(name, parameters):
    with torch.device("meta"):
        model = create_model(name, num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    with pytest.raises(ValueError, match=f"model '{name}' comes in one depth"):
        create_model(name, num_classes=1000, depth=50)
