"""The training command on an ImageNet LMDB: interrupted and resumed, on two ranks, with damaged images."""

import shutil
import signal

import pytest
import torch
from imagenet_images import CLASSES, make_tree
from training_runs import Cell, assert_same_end, losses, metrics, recipe, result

from classification.imagenet.prepare import build
from classification.models import create_model

CONFIG = """
table: imagenet_small
row: apollo
epochs: 2
batch: 6
passes: 2
eval_batch: 5
data: {{name: imagenet, root: {root}, size: 32, workers: 1}}
model: {{name: resnet, depth: 8}}
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


@pytest.fixture(scope="module")
def cell(folder):
    return Cell("classification.train", folder / "cell.yaml")


@pytest.fixture(scope="module")
def one_rank(folder, cell):
    return cell.complete(folder / "one_rank")


@pytest.fixture(scope="module")
def two_ranks(folder, cell):
    return cell.complete(folder / "two_ranks", ranks=2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_with_its_workers_and_resumed(cell, one_rank, tmp_path, number, status):
    """Ctrl-C reaches the whole process group; the workers must ignore it."""
    run_dir = tmp_path / "run"
    stopped = cell.interrupt(run_dir, at_update=3, number=number, group=True)
    assert stopped.status == status and not (run_dir / "result.json").exists()
    assert_same_end(cell.complete(run_dir, "data.workers=0"), one_rank)


def test_two_ranks_stopped_and_resumed(cell, two_ranks, tmp_path):
    run_dir = tmp_path / "run"
    assert cell.interrupt(run_dir, at_update=3, number=signal.SIGTERM, ranks=2).status == 128 + signal.SIGTERM
    assert not (run_dir / "result.json").exists()
    assert_same_end(cell.complete(run_dir, ranks=2), two_ranks)


def test_two_ranks_train_as_one(two_ranks, one_rank):
    assert len(losses(two_ranks)) == UPDATES
    assert losses(two_ranks) == pytest.approx(losses(one_rank), rel=1e-3, abs=1e-4)
    recipes = [recipe(run_dir) for run_dir in (two_ranks, one_rank)]
    assert [(facts["world_size"], facts["batch"], facts["passes"]) for facts in recipes] == [(2, 6, 2), (1, 6, 2)]
    assert [facts["batchnorm_batch"] for facts in recipes] == [6, 6]
    assert (result(two_ranks)["evaluated"], result(two_ranks)["complete"]) == (15, True)


def test_damaged_images_are_an_error_or_counted_in_the_record(folder, cell, tmp_path):
    path = folder / "tree" / "train" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    build(folder / "tree", tmp_path / "lmdb")
    path.write_bytes(content)
    settings = (f"data.root={tmp_path / 'lmdb'}", "epochs=1", "checkpoint.minutes=60")
    message = cell.refusal(tmp_path / "error", *settings)
    assert message.startswith(f"error: {tmp_path}/lmdb/train.lmdb, key 20 (class {CLASSES[1]}) cannot be decoded")
    skipped = cell.complete(tmp_path / "skip", *settings, "data.on_damaged=skip", "model={name: resnet18}")
    assert metrics(skipped, "epoch")[-1]["damaged"] == 1


def test_run_is_not_continued_with_another_set_of_classes(cell, tmp_path, one_rank):
    tree = make_tree(tmp_path / "tree", train=8, val=1)
    for split in ("train", "val"):
        (tree / split / CLASSES[2]).rename(tmp_path / split)
    build(tree, tmp_path / "lmdb")
    unfinished = shutil.copytree(one_rank, tmp_path / "run")
    (unfinished / "result.json").unlink()
    message = cell.refusal(unfinished, f"data.root={tmp_path / 'lmdb'}")
    assert "the checkpoint belongs to another model (fc.weight: (3, 64) there, (2, 64) here)" in message


def test_settings_of_imagenet_are_refused_elsewhere(cell, tmp_path):
    message = cell.refusal(tmp_path / "run", "data.name=digits")
    assert "data.size is a setting of data.name=imagenet alone" in message


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
