"""Download a file with a known checksum. An interrupted download continues."""

import urllib.error
import urllib.request
from hashlib import new
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError

TIMEOUT = 30.0  # seconds without an answer
BLOCK = 1 << 20


def download(url: str, path: Path, checksum: str | None = None) -> None:
    """Make `path` hold the file of `url`; an existing file is only checked. Raises UserError.

    `checksum` is "sha256:…" or "md5:…", or None if none is published.
    """
    if path.exists():
        if checksum and not matches(path, checksum):
            raise UserError(f"{path} is not the file that is expected, by its checksum: delete it, then run again")
        return
    part = path.with_name(f"{path.name}.part")
    try:
        _fetch(url, part)
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(f"{url}: {error}") from None
    if checksum and not matches(part, checksum):
        part.unlink()
        raise UserError(f"{url}: not the file that is expected, by its checksum")
    part.replace(path)


def matches(path: Path, checksum: str) -> bool:
    kind, _, expected = checksum.partition(":")
    return digest_of(path, kind) == expected


def digest_of(path: Path, kind: str) -> str:
    """A file's digest in hexadecimal digits, by hashlib's algorithm `kind`."""
    digest = new(kind, usedforsecurity=False)
    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, leave=False, disable=None)
    with open(path, "rb") as file, bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _fetch(url: str, part: Path) -> None:
    """Download to `part`, starting at its end."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left: the renaming was interrupted
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
