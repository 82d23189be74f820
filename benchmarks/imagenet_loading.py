"""Images per second of ImageNet's loader, against torchvision's usual loader and against decoding alone.

    python -m benchmarks.imagenet_loading DATA [--workers 1] [--batch 64] [--rounds 7] [--device cuda]

DATA holds real images, train/<class>/*. A hundred are enough: they are repeated up to --images, as files and as an
LMDB.

    torchvision    ImageFolder with RandomResizedCrop(224), RandomHorizontalFlip, ToTensor and Normalize on PIL images
    exact, fast    ImageNetData on the LMDB, up to the normalised batch on the device
    bare decode    the same bytes, from memory, decoded whole in one process: by simplejpeg, as exact and fast do, and
                   for comparison by Pillow

All take turns, and every other round reverses the order. Measures are the clock and the workers' CPU time, which a busy
machine disturbs less. Last comes the mean absolute difference between the pixels of fast and exact, in levels of 255.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import simplejpeg
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from classification.imagenet.data import MEAN, STD, TRAIN, ImageNetData, Request
from classification.imagenet.decode import central_view, exact, fast, open_rgb, random_view
from classification.imagenet.prepare import build
from engine.distributed import World
from engine.errors import UserError, run_main
from engine.run_record import describe_environment

Contender = Callable[[], tuple[float, float]]  # seconds an image: by the clock, and of CPU
DECODERS = ("exact", "fast")
BARE = "bare simplejpeg"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet_loading", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train/<class>/*")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1500, help="images a round, repeating those of DATA")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(1)

    environment = describe_environment(World(0, 1, 0, device))
    place, load = f"{environment['device']}, torch {environment['torch']}", os.getloadavg()[0]
    print(f"{place}, {options.workers} workers; load average at the start {load:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        tree = make_tree(options.data, Path(scratch) / "tree", options.images)
        build(tree, Path(scratch) / "lmdb")
        files = [path.read_bytes() for path in sorted(tree.glob("train/*/*"))]
        contenders = {"torchvision": torchvision_loader(tree, options, device)}
        for decoder in DECODERS:
            contenders[decoder] = our_loader(Path(scratch) / "lmdb", decoder, options, device)
        contenders["bare Pillow"] = bare(files, open_rgb)
        contenders[BARE] = bare(files, simplejpeg.decode_jpeg)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for number in tqdm(range(options.rounds + 1), "rounds", disable=None):
            order = list(contenders) if number % 2 else list(reversed(contenders))
            measured = {name: contenders[name]() for name in order}
            if number:  # the first round starts the workers
                for name, seconds in measured.items():
                    times[name].append(seconds)
        report(times, len(files), options.workers)
        print(
            f"the device's part: {device_part(Path(scratch) / 'lmdb', options, device):.3f} ms/image on {device.type}"
        )
        print_differences(files[:: max(1, len(files) // 300)])
    return 0


def make_tree(data: Path, tree: Path, count: int) -> Path:
    """A tree of `count` images: those of `data`, repeated under new names. val has one image of each class."""
    found = sorted(path for path in data.glob("train/*/*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise UserError(f"{data} holds no images: give a folder with train/<class>/*")
    for index in range(max(count, len(found))):
        path = found[index % len(found)]
        folder = tree / "train" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{index // len(found):04}_{path.name}")
    for folder in sorted((tree / "train").iterdir()):
        (tree / "val" / folder.name).mkdir(parents=True)
        first = min(folder.iterdir())
        shutil.copyfile(first, tree / "val" / folder.name / first.name)
    return tree


def torchvision_loader(tree: Path, options: argparse.Namespace, device: torch.device) -> Contender:
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = ImageFolder(str(tree / "train"), transforms.Compose(steps))
    loader = DataLoader(
        images,
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )

    def batches() -> Iterator[torch.Tensor]:
        return (images.to(device, non_blocking=True) for images, _ in loader)

    return timed(batches, loader)


def our_loader(root: Path, decoder: str, options: argparse.Namespace, device: torch.device) -> Contender:
    data = ImageNetData(root, decoder=decoder, workers=options.workers, device=device)
    epochs = iter(range(10**9))

    def batches() -> Iterator[torch.Tensor]:
        return (images for ((_, (images, _)),) in data.train_batches(next(epochs), options.batch))

    return timed(batches, data._loader)


def timed(batches: Callable[[], Iterator[torch.Tensor]], loader: DataLoader) -> Contender:
    """Take all batches. Times are per image, because a loader may drop the last, incomplete batch."""

    def run() -> tuple[float, float]:
        images, started, used = 0, time.perf_counter(), workers_cpu_s(loader)
        for batch in batches():
            images += len(batch)
        seconds = time.perf_counter() - started, workers_cpu_s(loader) - used
        return seconds[0] / images, seconds[1] / images

    return run


def bare(files: list[bytes], decode: Callable[[bytes], object]) -> Contender:
    def run() -> tuple[float, float]:
        started, used = time.perf_counter(), time.process_time()
        for content in files:
            decode(content)
        return (time.perf_counter() - started) / len(files), (time.process_time() - used) / len(files)

    return run


def workers_cpu_s(loader: DataLoader) -> float:
    """CPU seconds that the loader's worker processes have used so far, from /proc."""
    ticks = 0
    for worker in getattr(loader._iterator, "_workers", ()):
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def report(times: dict[str, list[tuple[float, float]]], images: int, workers: int) -> None:
    """Print medians over the rounds."""
    rounds = len(times["torchvision"])
    print(f"{images} images a round, {rounds} rounds, in turn; median (lowest to highest round)")
    print(f"{'by the clock':20} {'images/s a process':>22} {'x torchvision':>20} {'x bare decode':>20}")
    print_table(times, workers, measure=0)
    print(f"{'by CPU time':20} {'images/s of CPU':>22} {'x torchvision':>20} {'x bare decode':>20}")
    print_table(times, 1, measure=1)


def print_table(times: dict[str, list[tuple[float, float]]], workers: int, measure: int) -> None:
    """Ratios are taken round by round, for equal numbers of processes."""
    for name, measured in times.items():
        is_bare = name.startswith("bare")
        processes = 1 if is_bare else workers
        cells = [spread([1 / seconds[measure] / processes for seconds in measured], 0)]
        cells.append("" if is_bare else spread(ratios(times, "torchvision", name, measure), 2))
        if name in DECODERS:
            cells.append(spread([ratio / processes for ratio in ratios(times, BARE, name, measure)], 2))
        print(f"  {name:18} {cells[0]:>22}" + "".join(f" {cell:>20}" for cell in cells[1:]))


def ratios(times: dict[str, list[tuple[float, float]]], base: str, name: str, measure: int) -> list[float]:
    return [one[measure] / other[measure] for one, other in zip(times[base], times[name], strict=True)]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def device_part(root: Path, options: argparse.Namespace, device: torch.device) -> float:
    """Milliseconds an image for mirroring and normalisation on the device."""
    data = ImageNetData(root, workers=0, device=device)
    raw = data._loader.dataset[Request(TRAIN, 0, range(min(options.batch, data.train_size)))]
    measured = []
    for _ in range(20):
        started = time.perf_counter()
        images, _ = data._finish(raw, channels_last=True)
        images[0, 0, 0, 0].item()  # waits for the device
        measured.append((time.perf_counter() - started) / len(images))
    return 1000 * statistics.median(measured)


def print_differences(files: list[bytes]) -> None:
    def train_view(seed: int) -> Callable:
        return lambda width, height: random_view(width, height, 224, Random(seed))

    def val_view(width: int, height: int) -> tuple:
        return central_view(width, height, 256, 224)

    for name, views in (
        ("training", [train_view(seed) for seed in range(len(files))]),
        ("test", [val_view] * len(files)),
    ):
        pairs = [(fast(file, view, 224), exact(file, view, 224)) for file, view in zip(files, views, strict=True)]
        means = [(one.int() - other.int()).abs().float().mean().item() for one, other in pairs]
        print(
            f"fast against exact, {name} views of {len(means)} images: mean absolute difference "
            f"{statistics.mean(means):.3f} levels of 255, {max(means):.2f} in the worst image"
        )


if __name__ == "__main__":
    run_main(main)
