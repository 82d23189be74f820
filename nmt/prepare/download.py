"""The archives of WMT14 English-German, and their download: python -m nmt.prepare download FOLDER     (1.7 GB)

docs/data_facts.yaml names each checksum's source. If statmt.org fails, the text comes from Hugging Face's zip files.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.download import download
from engine.errors import UserError
from engine.files import hold

STATMT = "https://www.statmt.org"
HUB = "https://huggingface.co/datasets/wmt"


@dataclass(frozen=True)
class Archive:
    url: str
    checksum: str
    texts: Sequence[str]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


ARCHIVES = (
    Archive(
        f"{STATMT}/wmt13/training-parallel-europarl-v7.tgz",
        "sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
        ["europarl-v7.de-en"],
    ),
    Archive(
        f"{STATMT}/wmt13/training-parallel-commoncrawl.tgz",
        "sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
        ["commoncrawl.de-en"],
    ),
    Archive(
        f"{STATMT}/wmt14/training-parallel-nc-v9.tgz",
        "sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
        ["news-commentary-v9.de-en"],
    ),
    Archive(f"{STATMT}/wmt13/test.tgz", "md5:48eca5d02f637af44e85186847141f67", ["newstest2013"]),
    Archive(f"{STATMT}/wmt14/test-full.tgz", "md5:a8cd784e006feb32ac6f3d9ec7eb389a", ["newstest2014"]),
)
MIRRORS = (
    Archive(
        f"{HUB}/wmt13/resolve/main-zip/training-parallel-europarl-v7.zip",
        "sha256:5b2d8b32c2396da739b4e731871c597fcc6e75729becd74619d0712eecf7770e",
        ["europarl-v7.de-en"],
    ),
    Archive(
        f"{HUB}/wmt13/resolve/main-zip/training-parallel-commoncrawl.zip",
        "sha256:5ffe980072ea29adfd84568d099bea366d9f72772b988e670794ae851b4e5627",
        ["commoncrawl.de-en"],
    ),
    Archive(
        f"{HUB}/wmt14/resolve/main-zip/training-parallel-nc-v9.zip",
        "sha256:ce199f93ec56ff480137ba29f0819f9a22e70d88be6d7458f112303d67d623d5",
        ["news-commentary-v9.de-en"],
    ),
    Archive(
        f"{HUB}/wmt19/resolve/main-zip/translation-task/dev.zip",
        "sha256:d796e363740fdc4261aa6f5a3d2f8223e3adaee7d737b7724863325b8956dfd1",
        ["newstest2013", "newstest2014"],
    ),
)


def get_archives(
    folder: Path, wanted: Sequence[str], archives: Sequence[Archive] = ARCHIVES, mirrors: Sequence[Archive] = MIRRORS
) -> None:
    """Download archives with all `wanted` texts. UserError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    left, problems = set(wanted), []
    with hold(folder, "downloading"):
        for archive in (*archives, *mirrors):
            if left.isdisjoint(archive.texts):
                continue
            logging.info("%s", archive.url)
            try:
                download(archive.url, folder / archive.name, archive.checksum)
                left.difference_update(archive.texts)
            except UserError as error:
                problems.append(str(error))
    if left:
        raise UserError(
            f"{', '.join(sorted(left))} cannot be had ({'; '.join(problems)}): get the archives on a machine with "
            f"network, put them into {folder}, and run the same command again"
        )
