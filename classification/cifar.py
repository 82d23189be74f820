"""CIFAR's published archives, found or downloaded. torch is not imported: missing data are reported at once."""

from pathlib import Path
from typing import NamedTuple

from engine.download import download
from engine.errors import UserError
from engine.files import hold


class Archive(NamedTuple):
    """One data set as its authors publish it: https://www.cs.toronto.edu/~kriz/cifar.html"""

    url: str
    md5: str
    unpacked: str  # the folder in the archive

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


# As in torchvision/datasets/cifar.py.
ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
    ),
}


def provide(name: str, root: Path) -> None:
    """Download the archive `name`, unless it is there, packed or unpacked. Raises UserError."""
    archive = ARCHIVES[name]
    if not any((root / form).exists() for form in (archive.file, archive.unpacked)):
        fetch(name, root)


def fetch(name: str, root: Path) -> None:
    """Make `root` hold the published archive `name`. Raises UserError."""
    archive = ARCHIVES[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with hold(root, "downloading", wait=True):  # a second run finds what the first has downloaded
            download(archive.url, root / archive.file, f"md5:{archive.md5}")
    except (UserError, OSError) as error:
        raise not_complete(name, root, error) from None


def not_complete(name: str, root: Path, reason: Exception) -> UserError:
    archive = ARCHIVES[name]
    by_script = f" (or: bash scripts/prepare.sh cifar10 SOURCE {root})" if name == "cifar10" else ""
    return UserError(
        f"{name} is not complete in {root} and cannot be downloaded ({reason}): get {archive.file} on a machine with "
        f"network, and put it, as it is, into {root}{by_script}"
    )
