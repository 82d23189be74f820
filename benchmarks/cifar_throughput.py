"""Training images per second on CIFAR: classification/train.py against two baselines, in turn.

    python -m benchmarks.cifar_throughput [--depth 110] [--batch 128] [--precision fp32,bf16] [--device cuda] ...

    train.py    `train_epoch` on the Apollo cell of configs/cifar10, batches and metrics included
    bare loop   forward, backward and torch's fused SGD on one batch, at the same precision and memory format
    plain way   what most scripts do: NCHW, fp32, torchvision's transforms on PIL images, a DataLoader with 2 workers
                and a single-tensor Apollo. It has its own process, because train.py sets glibc's allocator

The images are noise. A round of train.py is a whole epoch.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from unittest.mock import patch

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import classification.train
from benchmarks.gpu.data import noise
from benchmarks.turns import CONFIGS, Contender, bare_loop, end_of_epoch, machine, prepared, report, speeds
from classification.augment import Images
from classification.data import DATASETS
from classification.models import create_model
from engine.distributed import World, setup
from engine.errors import run_main
from engine.precision import Precision
from optim import SGD, Apollo

CELL = CONFIGS / "cifar10" / "apollo_milestone.yaml"
CLASSES = 10


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="images/s of classification/train.py against two baselines")
    parser.add_argument("--depth", type=int, default=110, help="of the CIFAR ResNet: 6n+2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=5, help="updates of each contender in a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--precision", default="fp32", help="comma-separated: fp32, tf32, bf16, fp16")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)

    world = setup(options.device)
    torch.manual_seed(0)
    print(f"ResNet-{options.depth}, batch {options.batch}, {options.updates} updates x {options.rounds} rounds")
    print(f"{machine(world)}\n")
    amount, precisions = options.updates * options.batch, options.precision.split(",")
    images = patch.dict(DATASETS, {"folder": lambda root: noise(amount, CLASSES)})
    child = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as scratch, images, child:
        size = options.depth, options.batch, options.updates, options.device
        contenders: dict[str, Contender] = {"plain way, fp32": lambda: child.submit(train_plainly, *size).result()}
        for precision in precisions:
            contenders[f"bare loop, {precision}"] = on_one_batch(precision, options, world)
            contenders[f"train.py, {precision}"] = train_loop(precision, options, f"{scratch}/{precision}")
        found = speeds(contenders, amount, options.rounds, world)
    baselines = ("bare loop, {}", "plain way, fp32")
    report("images/s", found, [(f"train.py, {one}", name.format(one)) for one in precisions for name in baselines])


def train_loop(precision: str, options: argparse.Namespace, folder: str) -> Contender:
    size = [f"model.depth={options.depth}", f"batch={options.batch}"]
    where = [f"precision={precision}", f"device={options.device}", f"run_dir={folder}"]
    run = prepared(classification.train, CELL, "data={name: folder}", *size, *where)
    return partial(end_of_epoch, classification.train, run, options.updates)


def on_one_batch(precision: str, options: argparse.Namespace, world: World) -> Contender:
    model = create_model("resnet", CLASSES, options.depth).to(world.device, memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    images = torch.randn(options.batch, 3, 32, 32, device=world.device).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (options.batch,), device=world.device)
    updates = [[(images, labels)]] * options.updates
    cast = Precision(precision, world.device)
    return bare_loop(model, optimizer, cast, updates, lambda batch: cross_entropy(model(batch[0]), batch[1]))


class ImagesInMemory(Dataset):
    def __init__(self, images: Images, transform: Callable) -> None:
        self.images = [Image.fromarray(pixels) for pixels in images.pixels.numpy()]
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


@cache
def plain_way(depth: int, batch: int, updates: int, device: str) -> Contender:
    world = setup(device)
    torch.manual_seed(0)
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    steps += [transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    loader = DataLoader(
        ImagesInMemory(noise(updates * batch, CLASSES).train, transforms.Compose(steps)),
        batch,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )
    model = create_model("resnet", CLASSES, depth).to(world.device)
    optimizer = Apollo(model.parameters(), lr=0.5, weight_decay=5e-4, foreach=False, fused=False)

    def one_round() -> None:
        for images, labels in loader:
            images, labels = images.to(world.device), labels.to(world.device)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        world.synchronize()

    return one_round


def train_plainly(*size: object) -> None:
    """Runs in its own process, which keeps network and loader from round to round."""
    plain_way(*size)()


if __name__ == "__main__":
    run_main(main)
