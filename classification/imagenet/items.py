"""The list of a download's images, by `raw` or `hugging_face`."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from classification.image_files import printable
from classification.imagenet.lmdb import Record
from engine.errors import UserError


class Item(NamedTuple):
    """The place of one image: `size` bytes at `offset` of `path`; the whole file if `size` is -1.

    In a .tar.gz or parquet file, `offset` is the image's number.
    """

    path: str
    label: int
    offset: int = 0
    size: int = -1
    name: str = ""  # the image's name in an archive

    def read(self) -> bytes:
        """Raises UserError if the file cannot be read."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self.size < 0:
                    return file.readall()
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            place = printable(self.path)
            raise UserError(f"{place}: {error.strerror}: mend that, then run the same command to go on") from None
        if len(content) != self.size:
            raise UserError(f"{printable(self.path)} is truncated: {self.name} ends beyond its end; download it again")
        return content


Read = Callable[[Sequence[Item]], Iterator[Record]]  # from a split's images, or the last of them, to their content


class Source(NamedTuple):
    """A download: class names in label order, images in build order."""

    kind: str  # folder, tar, tar.gz or parquet
    classes: list[str]
    train: list[Item]
    val: list[Item]
    read: Read
