"""The parameter shapes of the published models."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from classification.models import create_model

Shape = tuple[int, ...]

BATCH = 2_560  # words of a batch of the language model
SEEN = 800  # steps in which Apollo's direction shrinks below all normal float32 numbers, by beta = 0.9 a step


def resnet110() -> list[Shape]:
    with torch.device("meta"):
        return shapes_of(create_model("resnet", num_classes=10, depth=110))


def resnext50() -> list[Shape]:
    with torch.device("meta"):
        return shapes_of(create_model("resnext50_32x4d", num_classes=1000))


def transformer_base() -> list[Shape]:
    """As in fairseq."""
    linear = lambda inputs, outputs: [(outputs, inputs), (outputs,)]  # noqa: E731
    attention, norm = linear(512, 512) * 4, [(512,), (512,)]
    feed_forward = linear(512, 2048) + linear(2048, 512)
    encoder_layer = attention + norm + feed_forward + norm
    decoder_layer = attention + norm + attention + norm + feed_forward + norm
    return [(40_000, 512), *(encoder_layer * 6), *(decoder_layer * 6)]


def lstm_1b() -> list[Shape]:
    """Of One Billion Words."""
    with torch.device("meta"):
        words = 793_470
        softmax = nn.AdaptiveLogSoftmaxWithLoss(2048, words, [60_000, 100_000, 640_000], div_value=4)
        return shapes_of(nn.ModuleList([nn.Embedding(words, 300), nn.LSTM(300, 2048, 2), softmax]))


def shapes_of(model: nn.Module) -> list[Shape]:
    return [tuple(param.shape) for param in model.parameters()]


# Name of the set: shapes, number of parameters, and L2 decay of its Apollo row.
SETS: dict[str, tuple[Callable[[], list[Shape]], int, float]] = {
    "resnet110": (resnet110, 1_730_714, 5e-4),
    "resnext50": (resnext50, 25_028_904, 2e-4),
    "transformer_base": (transformer_base, 64_618_496, 1e-8),
    "lstm_1b": (lstm_1b, 509_636_456, 0.0),
}


def shapes(name: str) -> list[Shape]:
    """The shapes of a set. RuntimeError if the number of parameters is wrong."""
    make, expected, _ = SETS[name]
    found = make()
    count = sum(math.prod(shape) for shape in found)
    if count != expected:
        raise RuntimeError(f"{name}: {count:,} parameters, not {expected:,}")
    return found


def gradients(name: str, device: torch.device, dense: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Random gradients with a set's shapes: for the steps so far, and for the next step.

    Both lists hold the same tensors. But without `dense` only the words of the last SEEN batches, or of the next one,
    have a gradient in the One Billion Words embedding. Zipf's law draws more rare words than the corpus has.
    """
    so_far = [torch.randn(shape, device=device) for shape in shapes(name)]
    following = list(so_far)
    if name == "lstm_1b" and not dense:
        frequencies = 1 / torch.arange(1, len(so_far[0]) + 1, dtype=torch.float64)
        words = torch.multinomial(frequencies, SEEN * BATCH, replacement=True).to(device)
        for grads, batch in ((following, words[:BATCH]), (so_far, words)):
            of_words = torch.zeros_like(grads[0])
            of_words[batch] = grads[0][batch]
            grads[0] = of_words
    return so_far, following
