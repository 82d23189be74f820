"""Training images per second on CIFAR, end to end: classification/train.py against two baselines, in turn.

    python -m benchmarks.cifar_throughput [--depth 110] [--batch 128] [--precision fp32,bf16] [--device cuda] ...

    train.py    `train_epoch` on the Apollo cell of configs/cifar10, batches and metrics included
    bare loop   the ceiling: forward, backward and torch's fused SGD on one fixed batch, at the same precision and
                memory format
    plain way   what most scripts do: NCHW, fp32, torchvision's transforms on PIL images, a DataLoader with 2 workers
                and a single-tensor Apollo. It has its own process, because train.py sets glibc's allocator

The images are noise, or those of `--data`.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.turns import COLUMNS, columns, end_of_epoch, machine, ratios, speeds
from classification.models import create_model
from classification.train import Config, prepare, train_epoch
from engine.config import load_config
from engine.distributed import World, setup
from engine.errors import UserError, run_main
from engine.precision import Precision
from engine.run_record import RunRecord
from optim import SGD, Apollo

CELL = Path(__file__).parents[1] / "configs" / "cifar10" / "apollo_milestone.yaml"
CLASSES = 10

Contender = Callable[[], None]  # takes the updates of a round


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="images/s of classification/train.py against two baselines")
    parser.add_argument("--depth", type=int, default=110, help="of the CIFAR ResNet: 6n+2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=5, help="updates of each contender in a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--precision", default="fp32", help="comma-separated: fp32, tf32, bf16, fp16")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", metavar="ROOT", help="take the images from ROOT/train/<class>/* instead of noise")
    options = parser.parse_args(arguments)

    world = setup(options.device)
    torch.manual_seed(0)
    updates = f"{options.updates} updates x {options.rounds} rounds"
    print(f"ResNet-{options.depth}, batch {options.batch}, {updates}, images: {options.data or 'noise'}")
    print(f"{machine(world)}\n")
    precisions, amount = options.precision.split(","), options.updates * options.batch
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        make_images(images, amount, options.data)
        contenders = {"plain way, fp32": in_a_process_of_its_own(plain_way, images, options)}
        for precision in precisions:
            contenders[f"bare loop, {precision}"] = bare_loop(precision, options, world)
            contenders[f"train.py, {precision}"] = train_loop(images, precision, options, world, Path(scratch))
        found = speeds(contenders, amount, options.rounds, world)
    report(found, precisions)


def train_loop(images: Path, precision: str, options: argparse.Namespace, world: World, scratch: Path) -> Contender:
    """A round is a whole epoch."""
    config = load_config(
        Config,
        CELL,
        [
            f"data={{name: folder, root: {images}}}",
            f"model.depth={options.depth}",
            f"batch={options.batch}",
            f"precision={precision}",
            f"device={options.device}",
            f"run_dir={scratch / precision}",
        ],
    )
    run = prepare(config, world, RunRecord(config, config.folder, world))
    return lambda: end_of_epoch(run, train_epoch, options.updates)


def bare_loop(precision: str, options: argparse.Namespace, world: World) -> Contender:
    model = create_model("resnet", CLASSES, options.depth).to(world.device, memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    images = torch.randn(options.batch, 3, 32, 32, device=world.device).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (options.batch,), device=world.device)
    cast = Precision(precision, world.device)

    def updates() -> None:
        for _ in range(options.updates):
            optimizer.zero_grad()
            with cast.autocast():
                loss = cross_entropy(model(images), labels)
            cast.backward(loss)
            cast.step(optimizer)

    return updates


class ImagesInMemory(Dataset):
    """Transformed PIL images and their labels."""

    def __init__(self, folder: Path, transform: Callable) -> None:
        files = [(file, label) for label, name in enumerate(sorted(folder.iterdir())) for file in name.iterdir()]
        self.images = [Image.open(file).convert("RGB") for file, _ in files]
        self.labels = [label for _, label in files]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def plain_way(images: Path, options: argparse.Namespace, world: World) -> Contender:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ]
    )
    loader = DataLoader(
        ImagesInMemory(images / "train", transform),
        options.batch,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
        pin_memory=world.device.type == "cuda",
    )
    model = create_model("resnet", CLASSES, options.depth).to(world.device)
    optimizer = Apollo(model.parameters(), lr=0.5, weight_decay=5e-4, foreach=False, fused=False)

    def updates() -> None:
        for images, labels in loader:
            images, labels = images.to(world.device), labels.to(world.device)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()

    return updates


def in_a_process_of_its_own(make: Callable[..., Contender], images: Path, options: argparse.Namespace) -> Contender:
    """`make(images, options, world)` in a child process."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spawn.Process(target=_serve, args=(theirs, make, images, options)).start()
    theirs.close()  # the child ends when `ours` is closed

    def updates() -> None:
        ours.send("go")
        ours.recv()

    return updates


def _serve(pipe: Connection, make: Callable[..., Contender], images: Path, options: argparse.Namespace) -> None:
    world = setup(options.device)
    torch.manual_seed(0)
    updates = make(images, options, world)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        updates()
        world.synchronize()
        pipe.send("done")


def report(found: dict[str, list[float]], precisions: list[str]) -> None:
    print(f"{'images/s':<24}{COLUMNS}")
    for name, values in found.items():
        print(f"{name:<24}{columns(values)}")
    print(f"\n{'ratio in the same round':<44}{'median':>8}   lowest .. highest")
    for precision in precisions:
        for baseline in (f"bare loop, {precision}", "plain way, fp32"):
            each = ratios(found[f"train.py, {precision}"], found[baseline])
            name = f"train.py, {precision}  /  {baseline}"
            print(f"{name:<44}{statistics.median(each):>8.3f}   {min(each):.3f} .. {max(each):.3f}")


def make_images(root: Path, count: int, source: str | None) -> None:
    """Exactly `count` training images: an epoch of train.py is then one round."""
    if source:
        classes = [sorted(folder.iterdir()) for folder in sorted(Path(source).glob("train/*")) if folder.is_dir()]
        files = [file for same_rank in zip(*classes, strict=False) for file in same_rank][:count]
        if len(classes) != CLASSES or len(files) < count:
            raise UserError(f"{source}/train: {CLASSES} classes of {count} images together are needed, all 32x32")
    noise = np.random.default_rng(0)
    for split, images in (("train", count), ("test", CLASSES)):
        for i in range(images):
            folder = root / split / str(i % CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            if source:
                shutil.copy(files[i], folder / f"{i}{files[i].suffix}")
            else:
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)


if __name__ == "__main__":
    run_main(main)
