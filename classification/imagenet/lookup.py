"""Finds values in an LMDB file, and believes nothing that the file says.

LMDB's own lookup follows a damaged page's numbers even beyond the file's end, where the system ends the process
(SIGBUS). This one checks each number first, so a damaged page is an error like any other.

The format is that of LMDB 0.9 on a little-endian machine of 64 bits: MDB_meta, MDB_db, MDB_page and MDB_node in
libraries/liblmdb/mdb.c (https://git.openldap.org/openldap/openldap). Branch and leaf pages are a B+ tree. A value
too large for a leaf has overflow pages, one after another.
"""

import mmap
import os
from bisect import bisect_left, bisect_right
from pathlib import Path
from struct import Struct, unpack_from
from typing import NamedTuple

META = Struct("<16x II 16x I 84x QQQ")  # MDB_meta, after the page's header: magic, version, fields of Meta
PAGE = Struct("<QHHHH")  # number, pad, flags, ends of the free space (or the count of overflow pages)
NODE = Struct("<HHHH")  # two halves of a size or page number, flags (or the number's third part), key size
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # flags of a page
OWN_PAGES = 1  # flag of a node: its value is in overflow pages
MAGIC, VERSION = 0xBEEFC0DE, 1
EMPTY = (1 << 64) - 1  # the root of an empty tree
DEEPEST = 32  # levels; LMDB's CURSOR_STACK
PAGE_SIZES = [1 << power for power in range(8, 17)]


class DamagedFile(ValueError):
    """A file that LMDB has not written so."""


class Meta(NamedTuple):
    """A transaction and its tree."""

    page_size: int
    root: int  # number of the page
    last: int  # number of the file's last page
    transaction: int


class Page(NamedTuple):
    """A branch or leaf: where it begins in the file, and its nodes in it."""

    start: int
    is_leaf: bool
    nodes: tuple[int, ...]


class LmdbFile:
    """An LMDB file, mapped into memory for reading. Forked processes may share it."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedFile if the file is not LMDB's or not whole, and OSError if it cannot be opened."""
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise DamagedFile("it is empty")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._bytes.madvise(mmap.MADV_RANDOM)
        self._view = memoryview(self._bytes)
        first = self._meta(0)
        # Each transaction writes the older of two meta pages.
        meta = max(first, self._meta(first.page_size), key=lambda meta: meta.transaction)
        self._page_size, self._root, self._last, _ = meta
        if self.size < (self._last + 1) * self._page_size:
            raise DamagedFile("its end is missing")

    def get(self, key: bytes) -> memoryview | None:
        """The value of `key`, or None. Raises DamagedFile if a page on the way is damaged."""
        if self._root == EMPTY:
            return None
        number = self._root
        for _ in range(DEEPEST):
            page = self._page(number)
            if page.is_leaf:
                return self._value(page, key)
            # A branch's first key stands for all smaller ones, and is not stored.
            child = bisect_right(page.nodes, key, lo=1, key=lambda node: self._key(page, node)[0]) - 1
            low, middle, high, _ = self._node(page, page.nodes[child])
            number = low | middle << 16 | high << 32
        raise DamagedFile("its pages lead in a circle")

    def _meta(self, start: int) -> Meta:
        if start + META.size > self.size:
            raise DamagedFile("its end is missing")
        magic, version, *values = META.unpack_from(self._bytes, start)
        meta = Meta(*values)
        if (magic, version) != (MAGIC, VERSION) or meta.page_size not in PAGE_SIZES:
            raise DamagedFile("it is no file of LMDB 0.9")
        return meta

    def _start(self, number: int) -> int:
        """Where page `number` begins, which must hold its number."""
        start = number * self._page_size
        if not 1 < number <= self._last or unpack_from("<Q", self._bytes, start) != (number,):
            raise DamagedFile(f"page {number:,} is not where it should be")
        return start

    def _page(self, number: int) -> Page:
        start = self._start(number)
        _, _, flags, lower, upper = PAGE.unpack_from(self._bytes, start)
        if flags not in (BRANCH, LEAF) or not PAGE.size < lower <= upper <= self._page_size or lower % 2:
            raise DamagedFile(f"page {number:,} is no part of the tree")
        count = (lower - PAGE.size) // 2
        return Page(start, flags == LEAF, unpack_from(f"<{count}H", self._bytes, start + PAGE.size))

    def _node(self, page: Page, node: int) -> tuple[int, int, int, int]:
        """The numbers of a node. Its key is inside the page."""
        if node + NODE.size > self._page_size:
            raise DamagedFile("a node is not inside its page")
        low, high, flags, key_size = NODE.unpack_from(self._bytes, page.start + node)
        if node + NODE.size + key_size > self._page_size:
            raise DamagedFile("a key is not inside its page")
        return low, high, flags, key_size

    def _key(self, page: Page, node: int) -> tuple[bytes, int]:
        """A node's key, and where it ends in the file."""
        key_size = self._node(page, node)[3]
        start = page.start + node + NODE.size
        return self._bytes[start : start + key_size], start + key_size

    def _value(self, page: Page, key: bytes) -> memoryview | None:
        place = bisect_left(page.nodes, key, key=lambda node: self._key(page, node)[0])
        if place == len(page.nodes):
            return None
        found, start = self._key(page, page.nodes[place])
        if found != key:
            return None
        low, high, flags, _ = self._node(page, page.nodes[place])
        size, end = low | high << 16, page.start + self._page_size
        if flags == OWN_PAGES and start + 8 <= end:
            own = self._start(*unpack_from("<Q", self._bytes, start))
            _, _, kind, low, high = PAGE.unpack_from(self._bytes, own)
            if kind != OVERFLOW:
                raise DamagedFile("a value is not where it should be")
            start, end = own + PAGE.size, min(own + (low | high << 16) * self._page_size, self.size)
        elif flags:
            raise DamagedFile("a value is of an unknown kind")
        if start + size > end:
            raise DamagedFile("a value is longer than its pages")
        return self._view[start : start + size]
