"""The Transformer of "Attention Is All You Need".

One matrix is the source, target and output embedding. `forward` sees whole sentences, `step` one word of each
hypothesis.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from overrides import override
from torch import Tensor, nn
from torch.nn.functional import linear

from nmt.attention import Attention, CrossAttention, SelfAttention, Size
from nmt.codec import PAD
from nmt.config import ModelConfig
from nmt.decoding_state import DecodingState
from nmt.dropout import Dropout
from nmt.loss import smoothed_cross_entropy
from nmt.rows import to_rows

FIRST_POSITION = 2  # as in fairseq: the padding's index there, 1, plus one


def create_model(config: ModelConfig, vocabulary_size: int) -> "Transformer":
    """The model, initialised as published from torch's global generator."""
    model = Transformer(config, vocabulary_size)
    model.initialise()
    return model


class Transformer(nn.Module):
    """Word ids are int64. Sentences end with PADs."""

    def __init__(self, config: ModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.width, padding_idx=PAD)
        self.dropout = Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        # Post-norm layers already end with a normalisation.
        last_norm = nn.LayerNorm if config.norm == "pre" else nn.Identity
        self.encoder_norm, self.decoder_norm = last_norm(config.width), last_norm(config.width)

    @torch.no_grad()
    def initialise(self) -> None:
        """As in fairseq's transformer of September 2020, on which the published code was built."""
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5)
        self.embedding.weight[PAD].zero_()
        for module in self.modules():
            if isinstance(module, Attention):
                module.initialise()

    @override(check_signature=False)
    def forward(
        self,
        source: Tensor,
        target_in: Tensor,
        target_out: Tensor | None = None,
        tokens: int = 0,
        label_smoothing: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V] for the words that follow `target_in`; with `target_out`, (loss, nll) of nmt/loss.py.

        Args:
            source: [B, S], ending with EOS.
            target_in: [B, T], beginning with BOS.
            target_out: [B, T], ending with EOS: the words to predict.
            tokens: the words in target_out without padding. To count them here would make the host wait.
        """
        hidden = self.decode(target_in, *self.encode(source))
        if target_out is None:
            return linear(hidden[: target_in.numel()], self.embedding.weight).view(*target_in.shape, -1)
        padded = (target_out == PAD).flatten()
        real = padded.to(torch.uint8).argsort(stable=True)[:tokens]  # nonzero() would make the host wait
        hidden, words = hidden.index_select(0, real), target_out.flatten()[real]
        return smoothed_cross_entropy(hidden, self.embedding.weight, words, label_smoothing)

    def encode(self, source: Tensor) -> tuple[Tensor, Size, Tensor | None]:
        """Memory as rows, its size, and the mask [B, 1, 1, S] of words to attend to (None: all)."""
        mask = (source != PAD)[:, None, None]
        if source.device.type == "cpu" and mask.all():  # on a GPU the host would wait
            mask = None
        x = self.embed(source, self.positions(source.shape[1], source.device))
        for layer in self.encoder:
            x = layer(x, source.shape, mask)
        return self.encoder_norm(x), source.shape, mask

    def decode(self, target_in: Tensor, memory: Tensor, memory_size: Size, mask: Tensor | None) -> Tensor:
        """Decoder output as rows. A word sees only words before it, so padding needs no mask."""
        x = self.embed(target_in, self.positions(target_in.shape[1], target_in.device))
        for layer in self.decoder:
            x = layer(x, target_in.shape, *layer.cross_attention.keys_values(memory, memory_size), mask)
        return self.decoder_norm(x)

    def start(self, source: Tensor, hypotheses: int) -> DecodingState:
        """The state for the first `step` of `hypotheses` translations a sentence."""
        memory, size, mask = self.encode(source)
        cross = [layer.cross_attention.keys_values(memory, size) for layer in self.decoder]
        return DecodingState(hypotheses, cross, mask)

    def step(self, words: Tensor, state: DecodingState) -> Tensor:
        """Logits [B, K, V] for the words after `words` [B, K], the newest ones (at first BOS)."""
        state.next_word()
        x = self.embed(words, self.positions(state.length, words.device)[-1])
        for index, layer in enumerate(self.decoder):
            x = layer.step(x, words.shape, state, index)
        return linear(self.decoder_norm(x), self.embedding.weight)[: words.numel()].view(*words.shape, -1)

    def embed(self, words: Tensor, positions: Tensor) -> Tensor:
        """Scaled embeddings of `words` [B, T] plus `positions` [T, width] or [width], as rows."""
        return self.dropout(to_rows(self.embedding(words) * math.sqrt(self.config.width) + positions))

    def positions(self, length: int, device: torch.device) -> Tensor:
        room = 256 * math.ceil(length / 256)  # few tables are made and kept
        return sinusoids(room, self.config.width, device)[:length]


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.width, config.heads, config.attention_dropout)
        self.feed_forward = FeedForward(config)
        self.attention_residual, self.feed_forward_residual = Residual(config), Residual(config)

    @override(check_signature=False)
    def forward(self, x: Tensor, size: Size, mask: Tensor | None) -> Tensor:
        x = self.attention_residual(x, lambda y: self.self_attention(y, size, mask))
        return self.feed_forward_residual(x, self.feed_forward)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config.width, config.heads, config.attention_dropout)
        self.cross_attention = CrossAttention(config.width, config.heads, config.attention_dropout)
        self.feed_forward = FeedForward(config)
        self.self_residual, self.cross_residual, self.feed_forward_residual = (Residual(config) for _ in range(3))

    @override(check_signature=False)
    def forward(self, x: Tensor, size: Size, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Whole target sentences of `size` [B, T]."""
        x = self.self_residual(x, lambda y: self.self_attention(y, size, causal=True))
        return self._rest(x, size, keys, values, mask)

    def step(self, x: Tensor, size: Size, state: DecodingState, index: int) -> Tensor:
        """The newest words, of `size` [B, K]. `index` is this layer's number."""
        x = self.self_residual(x, lambda y: self.self_attention.step(y, size, state, index))
        return self._rest(x, size, *state.cross[index], state.source_mask)

    def _rest(self, x: Tensor, size: Size, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        x = self.cross_residual(x, lambda y: self.cross_attention(y, size, keys, values, mask))
        return self.feed_forward_residual(x, self.feed_forward)


class Residual(nn.Module):
    """With layer norm of the sum (post) or of the sublayer's input (pre)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.norm_first = config.norm == "pre"

    @override(check_signature=False)
    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.inner_width)
        self.outer = nn.Linear(config.inner_width, config.width)
        self.dropout = Dropout(config.activation_dropout)

    @override(check_signature=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(self.inner(x).relu()))


@lru_cache(maxsize=16)
def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """[length, width]: all sines, then the cosines, as in fairseq's SinusoidalPositionalEmbedding.

    Wavelengths are a geometric series from 2 pi to 10,000 * 2 pi.
    """
    with torch.inference_mode(False):  # the table outlives the caller's inference mode
        half = width // 2
        frequencies = torch.exp(torch.arange(half, device=device) * (-math.log(10_000) / max(1, half - 1)))
        angles = torch.arange(FIRST_POSITION, FIRST_POSITION + length, device=device)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)
