"""Get the text of WMT14 English-German: python -m nmt.prepare.download OUT     (1.7 GB of archives, 1.4 GB of text)

Each archive is taken from the first mirror that has it (or from OUT, where somebody has put it) and compared with its
checksum; then the files that the recipe names are unpacked from it. Run the command again after an interruption:
downloads go on where they were. The checksums of the training archives are the SHA-256s that TensorFlow Datasets
publishes. For the two test archives sacreBLEU publishes an MD5, and we know of no SHA-256: theirs is written to
checksums.json at the first download, and compared at every later one.
"""

import argparse
import json
import logging
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import md5, sha256
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError, run_main
from engine.files import hold
from nmt.prepared import write_json

TIMEOUT = 30.0  # seconds of silence after which a mirror is given up
BLOCK = 1 << 20
CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Archive:
    """A tar file, where to get it, how to know it, and which of its members become which files."""

    name: str
    mirrors: Sequence[str]
    members: Mapping[str, str]
    sha256: str | None = None
    md5: str | None = None


STATMT = "https://www.statmt.org"
HUB = "https://huggingface.co/datasets/wmt"
WMT13 = f"{HUB}/wmt13/resolve/8e5ec410581dd0ae8039a038c2ae866915e2a47c"
WMT14 = f"{HUB}/wmt14-data/resolve/0e64fcc0d910c9e1c5c2ae91541096155d0f2e2f"
ARCHIVES = (
    Archive(
        "training-parallel-europarl-v7.tgz",
        (f"{STATMT}/wmt13", WMT13),
        {f"training/europarl-v7.de-en.{it}": f"europarl-v7.de-en.{it}" for it in ("en", "de")},
        sha256="0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
    ),
    Archive(
        "training-parallel-commoncrawl.tgz",
        (f"{STATMT}/wmt13", WMT13),
        {f"commoncrawl.de-en.{it}": f"commoncrawl.de-en.{it}" for it in ("en", "de")},
        sha256="c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
    ),
    Archive(
        "training-parallel-nc-v9.tgz",
        (f"{STATMT}/wmt14", WMT14),
        {f"training/news-commentary-v9.de-en.{it}": f"news-commentary-v9.de-en.{it}" for it in ("en", "de")},
        sha256="cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
    ),
    Archive(
        "test.tgz",
        (f"{STATMT}/wmt13",),
        {f"test/newstest2013-src.{it}.sgm": f"newstest2013.{it}" for it in ("en", "de")},
        md5="48eca5d02f637af44e85186847141f67",
    ),
    Archive(
        "test-full.tgz",
        (f"{STATMT}/wmt14",),
        {
            "test-full/newstest2014-deen-src.en.sgm": "newstest2014.en",
            "test-full/newstest2014-deen-ref.de.sgm": "newstest2014.de",
        },
        md5="a8cd784e006feb32ac6f3d9ec7eb389a",
    ),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m nmt.prepare.download", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the archives and the text")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    download(options.out)
    return 0


def download(out: Path, archives: Sequence[Archive] = ARCHIVES) -> None:
    """See to it that `out` holds the text files of all `archives`; UserError where one cannot be had."""
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, "downloading"):
        for archive in archives:
            if all((out / name).exists() for name in archive.members.values()):
                logging.info("%s: its files are there", archive.name)
                continue
            _get(archive, out)
            _unpack(archive, out)
    logging.info("next: python -m nmt.prepare wmt14_en_de %s OUT", out)


def _get(archive: Archive, out: Path) -> None:
    """See to it that the archive is in `out`, from the first mirror that gives it whole."""
    part, problems = out / f"{archive.name}.part", []
    if (out / archive.name).exists():
        if _is_it(archive, out):
            return
        problems.append(f"the one in {out} is not the file that is expected, by its checksum")
    for mirror in archive.mirrors:
        try:
            _fetch(f"{mirror}/{archive.name}", part)
        except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
            problems.append(f"{mirror}: {error}")
            continue
        part.replace(out / archive.name)
        if _is_it(archive, out):
            return
        (out / archive.name).unlink()
        problems.append(f"{mirror}: not the file that is expected, by its checksum")
    raise UserError(
        f"{archive.name} cannot be had ({'; '.join(problems)}): get it on a machine with network, put it into {out}, "
        "and run the same command again"
    )


def _fetch(url: str, part: Path) -> None:
    """Download to `part`, from where it ends."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is no more: it was interrupted between the last byte and its renaming
            raise
        return
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        have = file.tell()
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with tqdm(total=total, initial=have, desc=url, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() != total:
            raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _is_it(archive: Archive, out: Path) -> bool:
    """Whether the archive in `out` is the one. A SHA-256 that is seen for the first time is recorded."""
    found = {"sha256": sha256(), "md5": md5(usedforsecurity=False)}
    with open(out / archive.name, "rb") as file:
        while block := file.read(BLOCK):
            for digest in found.values():
                digest.update(block)
    recorded = json.loads((out / CHECKSUMS).read_text()) if (out / CHECKSUMS).exists() else {}
    known = {"sha256": archive.sha256 or recorded.get(archive.name), "md5": archive.md5}
    if any(value and found[kind].hexdigest() != value for kind, value in known.items()):
        return False
    if not known["sha256"]:
        recorded[archive.name] = found["sha256"].hexdigest()
        write_json(out / CHECKSUMS, recorded)
    return True


def _unpack(archive: Archive, out: Path) -> None:
    """Write the archive's members as plain text, each whole or not at all."""
    left = dict(archive.members)
    with tarfile.open(out / archive.name) as tar, tqdm(desc=f"unpacking {archive.name}", unit="B", disable=None) as bar:
        for member in tar:
            name = left.pop(member.name.removeprefix("./"), None)
            if name is None:
                continue
            temporary = out / f"{name}.tmp"
            with tar.extractfile(member) as source, open(temporary, "wb") as target:
                if member.name.endswith(".sgm"):
                    target.write(sgm_to_text(source.read().decode()).encode())
                else:
                    shutil.copyfileobj(source, target, BLOCK)
                bar.update(target.tell())
            temporary.replace(out / name)
            if not left:
                return
    raise UserError(f"{out / archive.name} does not hold {', '.join(left)}: delete it and run the same command again")


def sgm_to_text(sgm: str) -> str:
    """The segments of WMT's SGM, a line each, as sacreBLEU reads them: white space is joined, entities stay."""
    segments = re.findall(r"<seg[^>]*>(.*?)</seg>", sgm, flags=re.DOTALL)
    return "".join(f"{' '.join(segment.split())}\n" for segment in segments)


if __name__ == "__main__":
    run_main(main)
