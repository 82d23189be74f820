"""Images per second of ImageNet's loader, against torchvision's and decoding alone.

    python -m benchmarks.imagenet_loading DATA [--workers 1] [--batch 64] [--rounds 7] [--device cuda]

DATA holds real images, train/<class>/*. A hundred are enough: they are repeated up to --images.

    torchvision    ImageFolder with RandomResizedCrop(224), RandomHorizontalFlip, ToTensor and Normalize
    exact, fast    ImageNetData on an LMDB, up to the normalised batch on the device
    bare           the same bytes, from memory, decoded whole in one process, by simplejpeg and by Pillow

A busy machine disturbs CPU time less than the clock. Last comes the mean absolute difference between the pixels of fast
and exact, in levels of 255.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import simplejpeg
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.turns import machine, report, turns
from classification.image_files import is_image
from classification.imagenet.data import MEAN, STD, ImageNetData
from classification.imagenet.decode import central_view, exact, fast, open_rgb, random_view
from classification.imagenet.prepare import build
from engine.distributed import setup
from engine.errors import UserError, run_main

Contender = Callable[[], tuple[float, float]]  # seconds an image: by the clock, and of CPU
DECODERS = ("exact", "fast")
BARE = "bare simplejpeg"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet_loading", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train/<class>/*")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1500, help="images a round, repeating those of DATA")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    load = os.getloadavg()[0]
    print(f"{machine(setup(options.device))}, {options.workers} workers; load average at the start {load:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        tree = make_tree(options.data, Path(scratch) / "tree", options.images)
        build(tree, Path(scratch) / "lmdb")
        files = [path.read_bytes() for path in sorted(tree.glob("train/*/*"))]
        contenders = {"torchvision": torchvision_loader(tree, options)}
        for decoder in DECODERS:
            contenders[decoder] = our_loader(Path(scratch) / "lmdb", decoder, options)
        contenders["bare Pillow"] = bare(files, open_rgb)
        contenders[BARE] = bare(files, simplejpeg.decode_jpeg)
        for run in contenders.values():  # starts the workers
            run()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for name in turns(contenders, options.rounds):
            times[name].append(contenders[name]())
        print(f"{len(files)} images a round, in turn\n")
        report_both(times, options.workers)
        print()
        print_differences(files[:: max(1, len(files) // 300)])


def make_tree(data: Path, tree: Path, images: int) -> Path:
    """A tree of so many images, those of `data` repeated; val has one of each class."""
    found = sorted(path for path in data.glob("train/*/*") if is_image(str(path)))
    if not found:
        raise UserError(f"{data} holds no images: give a folder with train/<class>/*")
    for index in range(max(images, len(found))):
        path = found[index % len(found)]
        folder = tree / "train" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{index // len(found):04}_{path.name}")
    for folder in sorted((tree / "train").iterdir()):
        (tree / "val" / folder.name).mkdir(parents=True)
        first = min(folder.iterdir())
        shutil.copyfile(first, tree / "val" / folder.name / first.name)
    return tree


def torchvision_loader(tree: Path, options: argparse.Namespace) -> Contender:
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = ImageFolder(str(tree / "train"), transforms.Compose(steps))
    loader = DataLoader(
        images,
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=True,
        pin_memory=options.device == "cuda",
    )

    def epoch() -> int:
        return sum(len(images.to(options.device, non_blocking=True)) for images, _ in loader)

    return timed(epoch, partial(workers_cpu_s, loader))


def our_loader(root: Path, decoder: str, options: argparse.Namespace) -> Contender:
    data = ImageNetData(root, decoder=decoder, workers=options.workers, device=options.device)
    numbers = count()

    def epoch() -> int:
        return sum(len(images) for ((_, (images, _)),) in data.train_batches(next(numbers), options.batch))

    return timed(epoch, partial(workers_cpu_s, data._loader))


def bare(files: list[bytes], decode: Callable[[bytes], object]) -> Contender:
    def decode_all() -> int:
        for content in files:
            decode(content)
        return len(files)

    return timed(decode_all, time.process_time)


def timed(work: Callable[[], int], cpu_s: Callable[[], float]) -> Contender:
    """Times an image; `work` returns their number, as a loader may drop an incomplete batch."""

    def run() -> tuple[float, float]:
        started, used = time.perf_counter(), cpu_s()
        images = work()
        return (time.perf_counter() - started) / images, (cpu_s() - used) / images

    return run


def workers_cpu_s(loader: DataLoader) -> float:
    """CPU seconds of the loader's workers, from /proc."""
    ticks = 0
    for worker in getattr(loader._iterator, "_workers", ()):
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def report_both(times: dict[str, list[tuple[float, float]]], workers: int) -> None:
    """By the clock for equal numbers of processes, and by CPU time."""
    pairs = [(decoder, baseline) for baseline in ("torchvision", BARE) for decoder in DECODERS]
    processes = {name: 1 if name.startswith("bare") else workers for name in times}
    by_clock = {name: [1 / clock / processes[name] for clock, _ in measured] for name, measured in times.items()}
    report("images/s a process", by_clock, pairs)
    print()
    report("images/s of CPU time", {name: [1 / cpu for _, cpu in measured] for name, measured in times.items()}, pairs)


def print_differences(files: list[bytes]) -> None:
    views: dict[str, Callable[[int], Callable]] = {
        "training": lambda number: partial(random_view, size=224, random=Random(number)),
        "test": lambda number: partial(central_view, resize=256, size=224),
    }
    for name, view in views.items():
        pairs = [(fast(file, view(n), 224), exact(file, view(n), 224)) for n, file in enumerate(files)]
        means = [(one.int() - other.int()).abs().float().mean().item() for one, other in pairs]
        print(
            f"fast against exact, {name} views of {len(means)} images: mean absolute difference "
            f"{statistics.mean(means):.3f} levels of 255, {max(means):.2f} in the worst image"
        )


if __name__ == "__main__":
    run_main(main)
