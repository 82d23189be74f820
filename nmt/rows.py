"""Hidden states as rows, [R, width]: all words of a batch, and sometimes a few idle rows.

On the CPU, half-precision matrix products are compiled for each new number of rows, which takes milliseconds and keeps
megabytes. Rounding up leaves eight sizes to a power of two.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def rounded(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """`rows`, rounded up to four significant bits if products are compiled for their size."""
    if device.type != "cpu" or dtype == torch.float32:
        return rows
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of `x`: autocast's, if autocast is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def to_rows(x: Tensor) -> Tensor:
    """[B, T, width] to [R, width]. Rows from B * T on are idle: zeros."""
    words = x.shape[0] * x.shape[1]
    return pad(x.flatten(0, 1), (0, 0, 0, rounded(words, product_dtype(x), x.device) - words))
