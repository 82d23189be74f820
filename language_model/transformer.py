"""A decoder-only Transformer in the place of the LSTM.

Layers are pre-norm. Positions are rotary (Su et al. 2021, arXiv 2104.09864). An input word's vector is its row in the
softmax: tied and adaptive embeddings (Press and Wolf 2017, arXiv 1608.05859; Baevski and Auli 2019, arXiv 1809.10853).
Each matrix is a parameter of its own, without a bias, because some optimizers (Muon) treat each by itself.

The network sees at most `window` tokens, the config's sequence_length: in training a row of a batch. In evaluation the
state holds the last half of a window, so each token is predicted from at least as many, where the text has them.
"""

from collections.abc import Sequence

import torch
from overrides import override
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, scaled_dot_product_attention

from language_model.config import TransformerConfig
from language_model.softmax import adaptive_log_prob, create_softmax

ROTARY_BASE = 10_000.0  # Su et al. 2021, section 3.2.2


class Transformer(nn.Module):
    """Predicts a token from at most `window` tokens before it. ValueError for cutoffs that do not fit `words` words."""

    def __init__(self, config: TransformerConfig, words: int, window: int) -> None:
        super().__init__()
        self.window, self.head_width = window, config.width // config.heads
        self.test_steps = window - window // 2  # columns of a test batch; the state is the rest of the window
        self.softmax = create_softmax(config.width, words, config.cutoffs, config.div_value)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal draws with a standard deviation of inputs**-0.5, which keeps the variance of a matrix's input.

        The output of each part of a layer is divided by the square root of the number of parts (Radford et al. 2019,
        section 2.3). Word vectors have width**-0.5, in clusters after the projection. So words' scores have variance 1,
        and the input word itself is not predicted as the next one.
        """
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        with torch.no_grad():
            for layer in self.layers:
                layer.out.weight /= (2 * len(self.layers)) ** 0.5
                layer.narrow.weight /= (2 * len(self.layers)) ** 0.5
        width = self.softmax.in_features
        nn.init.normal_(self.softmax.head.weight, std=width**-0.5)
        for projection, rows in self.softmax.tail:
            nn.init.normal_(projection.weight, std=projection.out_features**-0.5)
            nn.init.normal_(rows.weight, std=width**-0.5)

    def zero_state(self, rows: int) -> Tensor:
        """The state at a text's start: int64 [1, 1, rows, 0]."""
        return torch.zeros(1, 1, rows, 0, dtype=torch.int64, device=self.softmax.head.weight.device)

    @override(check_signature=False)  # torch declares that forward returns None
    def forward(
        self, tokens: Tensor, targets: Tensor, state: Tensor, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As LanguageModel.forward. The state and `tokens` together have at most `window` tokens a row."""
        seen = torch.cat([state[0, 0], tokens.T], 1)  # [rows, tokens]
        x = self.dropout(word_vectors(self.softmax, seen))
        angles = rotary_angles(seen.shape[1], self.head_width, seen.device)
        for layer in self.layers:
            x = layer(x, angles)
        new = self.norm(x[:, state.shape[-1] :])
        log_prob = adaptive_log_prob(self.softmax, new.flatten(0, 1), targets.T.flatten(), sizes).view_as(targets.T).T
        kept = 0 if self.training else self.window - self.test_steps
        return log_prob, seen[None, None, :, max(0, seen.shape[1] - kept) :]


class Layer(nn.Module):
    """Causal attention and a feed-forward part; each adds to its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, inner = config.width, config.inner_width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.inner_norm = nn.LayerNorm(width, bias=False)
        self.widen, self.narrow = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @override(check_signature=False)
    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """`x` and the result: [rows, steps, width]."""
        x = x + self.dropout(self._attention(self.attention_norm(x), angles))
        return x + self.dropout(self.narrow(gelu(self.widen(self.inner_norm(x)))))

    def _attention(self, x: Tensor, angles: Tensor) -> Tensor:
        queries, keys, values = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [rows, heads, steps, width / heads]
            for projection in (self.query, self.key, self.value)
        )
        found = scaled_dot_product_attention(rotated(queries, angles), rotated(keys, angles), values, is_causal=True)
        return self.out(found.transpose(1, 2).flatten(-2))


def word_vectors(softmax: nn.AdaptiveLogSoftmaxWithLoss, tokens: Tensor) -> Tensor:
    """The rows of `tokens` in the softmax, in clusters after the projection: [*tokens.shape, width].

    Each cluster computes all tokens, so that the host need not wait.
    """
    vectors = embedding(tokens.clamp(max=softmax.cutoffs[0] - 1), softmax.head.weight)
    for (projection, rows), low, high in zip(softmax.tail, softmax.cutoffs[:-1], softmax.cutoffs[1:], strict=True):
        in_cluster = embedding((tokens - low).clamp(0, high - low - 1), rows.weight) @ projection.weight
        vectors = torch.where(((tokens >= low) & (tokens < high))[..., None], in_cluster, vectors)
    return vectors


def rotary_angles(steps: int, size: int, device: torch.device) -> Tensor:
    """The angle of each pair of a head's `size` features at each position, float32 [steps, size / 2]."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    return torch.arange(steps, dtype=torch.float32, device=device)[:, None] * frequencies


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """`x`, [..., steps, size], with its features (i, i + size / 2) turned by `angles`; of x's dtype."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(x)
