"""Download a file. An interrupted download continues, unless the server's file has changed meanwhile."""

import urllib.error
import urllib.request
from hashlib import new
from http.client import HTTPException, HTTPMessage
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError
from engine.files import wait_for_disk

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
    part, version = (path.with_name(f"{path.name}.{kind}") for kind in ("part", "version"))
    try:
        _fetch(url, part, version, is_checked=checksum is not None)
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(f"{url}: {error}") from None
    version.unlink(missing_ok=True)
    if checksum and not matches(part, checksum):
        part.unlink()
        raise UserError(f"{url}: not the file that is expected, by its checksum")
    wait_for_disk(part)
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


def _fetch(url: str, part: Path, version: Path, is_checked: bool) -> None:
    """Download to `part`, starting at its end if it is of the server's present version.

    `version` keeps the server's name for the version of `part`. Without a name, only a checksum can show two halves of
    different versions.
    """
    have = part.stat().st_size if part.exists() else 0
    name = version.read_text(encoding="latin-1") if version.exists() else ""
    headers = {}
    if have and (name or is_checked):
        headers = {"Range": f"bytes={have}-"} | ({"If-Range": name} if name else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left: the renaming was interrupted
            raise
        return
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        have = file.tell()
        if not have:
            version.write_text(_version(response.headers), encoding="latin-1")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with tqdm(total=total, initial=have, desc=url, unit="B", unit_scale=True, disable=None) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() != total:
            raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _version(headers: HTTPMessage) -> str:
    """What If-Range takes (RFC 9110, section 13.1.5): a strong ETag, or else the date; "" if there is neither."""
    tag = headers.get("ETag", "W/")
    return headers.get("Last-Modified", "") if tag.startswith("W/") else tag
