"""Finds the two sides of a text: plain files, the tree that fairseq's script leaves in orig/, SGM, or the archives.

A text has one of these names:

    europarl-v7.de-en.en            plain, one sentence a line
    newstest2013-src.en.sgm         of statmt's test.tgz
    newstest2014-deen-ref.de.sgm    of statmt's test-full.tgz: either language may be src
"""

import logging
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from engine.download import matches
from engine.errors import UserError
from engine.files import wait_for_disk
from engine.nearest_folder import nearest_folder
from nmt.prepare.download import ARCHIVES, MIRRORS

FOLDERS = ("", "training", "test-full", "dev", "test")  # in the archives and in orig/
CHECKSUMS = {archive.name: archive.checksum for archive in (*ARCHIVES, *MIRRORS)} | {"dev.tgz": None}
HUB_SET = "Hugging Face's wmt14, which is another set: 4,508,785 training pairs instead of 4,520,620"
BLOCK = 1 << 20
MOST_LISTED = 10_000  # entries searched for similar names


class Place(NamedTuple):
    path: Path  # a text, SGM, or an archive
    member: str | None = None  # of the archive

    @property
    def is_plain(self) -> bool:
        return self.member is None and self.path.suffix != ".sgm"


Side = tuple[str, str]  # text, language


def find_texts(source: Path, texts: Sequence[str], languages: Sequence[str], unpacked: Path) -> dict[str, list[Path]]:
    """For each of `texts` a plain file in both `languages`, from `source` or made in `unpacked`.

    A text is a name or a path below `source`. UserError if one is nowhere, or an archive is not the published one.
    """
    places = locate(source, texts, languages)
    files = {
        (text, language): place.path if place.is_plain else unpacked / f"{os.path.basename(text)}.{language}"
        for (text, language), place in places.items()
    }
    for side, place in places.items():
        if place.member is None and not place.is_plain:
            with open(place.path, "rb") as content:
                _write(files[side], content, place.path.name)
    for archive in dict.fromkeys(place.path for place in places.values() if place.member):
        _unpack(archive, {place.member: files[side] for side, place in places.items() if place.path == archive})
    return {text: [files[text, language] for language in languages] for text in texts}


def locate(source: Path, texts: Sequence[str], languages: Sequence[str]) -> dict[Side, Place]:
    """Where `source` holds each side of `texts`. UserError if one is found nowhere."""
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "is not there"
        raise UserError(f"{source} {what}: SOURCE is the folder that holds the text, or the archives with it")
    left = [(text, language) for text in texts for language in languages]
    places = {side: Place(path) for side in left if (path := _in_folders(source, *side))}
    for name in CHECKSUMS:
        left = [side for side in left if side not in places]
        if left and (source / name).is_file():
            members = _members(source / name)
            for side in left:
                if found := [members[known] for known in names(*side) if known in members]:
                    places[side] = Place(source / name, found[0])
    if left := [side for side in left if side not in places]:
        raise UserError(_nothing(source, *left[0]))
    return places


def first_lines(place: Place, count: int) -> list[str]:
    """Up to `count` lines of a plain file, or of an archive's plain member."""
    with _readable(place.path):
        if place.member is None:
            with open(place.path, "rb") as file:
                return [line.decode(errors="replace") for line in islice(file, count)]
        for _, content in _open_members(place.path, [place.member]):  # the loop keeps the archive open
            return [line.decode(errors="replace") for line in islice(content, count)]
    return []


def names(text: str, language: str) -> list[str]:
    """Possible file names, the best first: of SGM, the one that sacreBLEU and fairseq take."""
    ours, other = ("src", "ref") if language == "en" else ("ref", "src")
    kinds = ("-src", "-ref", f"-deen-{ours}", f"-deen-{other}")
    return [f"{text}.{language}", *(f"{text}{kind}.{language}.sgm" for kind in kinds)]


def sgm_to_text(sgm: str) -> str:
    """The segments, one a line, as sacreBLEU reads them: white space joined, entities kept."""
    segments = re.findall(r"<seg[^>]*>(.*?)</seg>", sgm, flags=re.DOTALL)
    return "".join(f"{' '.join(segment.split())}\n" for segment in segments)


def _in_folders(source: Path, text: str, language: str) -> Path | None:
    parent, name = os.path.split(text)
    places = (source / parent / folder / kind for kind in names(name, language) for folder in FOLDERS)
    return next((path for path in places if path.is_file()), None)


def _unpack(archive: Path, targets: Mapping[str, Path]) -> None:
    missing = {member: path for member, path in targets.items() if not path.exists()}
    checksum = CHECKSUMS[archive.name]
    if missing and checksum and not matches(archive, checksum):
        raise UserError(f"{archive} is not the file that is expected, by its checksum: delete it, get it again")
    with _readable(archive):
        for member, content in _open_members(archive, missing):
            logging.info("unpacking %s of %s", member, archive.name)
            _write(missing[member], content, member)


@cache
def _members(archive: Path) -> dict[str, str]:
    logging.info("looking into %s", archive)
    with _readable(archive):
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as content:
                paths = content.namelist()
        else:
            with tarfile.open(archive) as content:
                paths = content.getnames()
    return {os.path.basename(path): path for path in paths}


def _open_members(archive: Path, wanted: Collection[str]) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            for member in wanted:
                yield member, content.open(member)
    elif left := set(wanted):
        with tarfile.open(archive, "r|*") as content:
            for member in content:
                if member.name in left:
                    yield member.name, content.extractfile(member)
                    left.remove(member.name)
                if not left:
                    return


def _write(path: Path, content: IO[bytes], name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with content, open(temporary, "wb") as file:
        if name.endswith(".sgm"):
            file.write(sgm_to_text(content.read().decode()).encode())
        else:
            with tqdm.wrapattr(file, "write", desc=name, disable=None, leave=False) as counted:
                shutil.copyfileobj(content, counted, BLOCK)
    wait_for_disk(temporary)
    os.replace(temporary, path)
    return path


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole archive ({error}): delete it, get it again") from None


def _nothing(source: Path, text: str, language: str) -> str:
    """An error message: what was looked for, and similar names there."""
    folder, name = source / os.path.dirname(text), os.path.basename(text)
    looked, archives = [f"{name}.{language}"], [archive.name for archive in ARCHIVES if name in archive.texts]
    if name.startswith("newstest"):
        looked.append(f"{name}-*.{language}.sgm")
    where = f"{folder} or its folders {', '.join(FOLDERS[1:])}" if archives else folder
    message = f"no {name}.{language} in {where}: looked for {', '.join(looked + archives)}"
    entries = islice(chain(folder.glob("[!.]*"), folder.glob("[!.]*/*")), MOST_LISTED)
    listing = sorted(str(path.relative_to(folder)) for path in entries)
    if any(entry.endswith((".parquet", ".arrow")) for entry in listing):
        return f"{message}; what lies there looks like {HUB_SET}"
    if any("test-filtered" in entry for entry in listing) and name == "newstest2014":
        return f"{message}; test-filtered is another test set, of 2,737 lines"
    start = re.split(r"[-.]", name)[0]
    similar = [entry for entry in listing if os.path.basename(entry).startswith(start)][:4]
    message = f"{message}; what is there: {', '.join(similar or listing[:4]) or 'nothing'}"
    near = nearest_folder(folder, lambda other: _in_folders(other, name, language) or _has_archive(other, name))
    return f"{message}; the nearest folder that has it: {near}" if near else message


def _has_archive(folder: Path, text: str) -> bool:
    return any((folder / one.name).is_file() for one in (*ARCHIVES, *MIRRORS) if text in one.texts)
