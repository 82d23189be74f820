"""The published language model: an embedding, an LSTM (or GRU, or plain RNN), and an adaptive softmax over all words.

The network's state is one float32 tensor [parts, layers, rows, hidden]. The parts are h and c for an LSTM, and only h
for the others. The state is detached; the training loop keeps it, and a checkpoint contains it.

`create_model` makes it, or the Transformer of transformer.py, whose state has its rows in the same place.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
from overrides import override
from torch import Tensor, nn

from language_model.config import ModelConfig, TransformerConfig
from language_model.data import TEST_STEPS
from language_model.softmax import adaptive_log_prob, create_softmax
from language_model.transformer import Transformer

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class LanguageModel(nn.Module):
    """Predicts each token from those before it.

    Args:
        words: size of the vocabulary. The ids go from the most to the least frequent word.
        cell: lstm, gru or rnn (tanh).
        embedding, hidden, layers: sizes; published: 300, 2048, 2.
        dropout: on the embeddings, between the layers, and on the last layer's output.
        cutoffs: ids where the adaptive softmax starts a new cluster; published: 60000, 100000, 640000. The projection
            of cluster i = 1, 2, ... after the first cutoff has hidden / div_value**i dimensions.

    Raises:
        ValueError: an unknown cell, or cutoffs that do not fit the vocabulary.
    """

    def __init__(
        self,
        words: int,
        cell: str = "lstm",
        *,
        embedding: int = 300,
        hidden: int = 2048,
        layers: int = 2,
        dropout: float = 0.1,
        cutoffs: Sequence[int] = (60_000, 100_000, 640_000),
        div_value: float = 4.0,
    ) -> None:
        super().__init__()
        self.test_steps = TEST_STEPS
        if cell not in CELLS:
            raise ValueError(f"unknown cell '{cell}'; valid: {', '.join(CELLS)}")
        self.parts = 2 if cell == "lstm" else 1
        self.embedding = nn.Embedding(words, embedding)
        self.rnn = CELLS[cell](embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.softmax = create_softmax(hidden, words, cutoffs, div_value)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Published: He-uniform embedding, Xavier-uniform recurrent matrices, zero biases. The softmax keeps torch's.

        An LSTM has two bias vectors per layer. The forget gate's quarter of each is 1, so together they add 2.
        """
        nn.init.kaiming_uniform_(self.embedding.weight)
        for parameter in self.rnn.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
                if isinstance(self.rnn, nn.LSTM):
                    nn.init.ones_(parameter.data.chunk(4)[1])  # the gates' order is input, forget, cell, output

    def zero_state(self, rows: int) -> Tensor:
        """The state at the start of a text."""
        shape = self.parts, self.rnn.num_layers, rows, self.rnn.hidden_size
        return self.embedding.weight.new_zeros(shape, dtype=torch.float32)

    @override(check_signature=False)  # torch declares that forward returns None
    def forward(self, tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets`, float32 [steps, rows], and the state after the last step.

        `tokens` and `targets`: int64 [steps, rows]. A target is the token that follows.
        """
        embedded = self.dropout(self.embedding(tokens))
        if self.parts == 2:
            lacking = embedded.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not cpu_has_bf16_lstm()
            with torch.autocast("cpu", enabled=False) if lacking else nullcontext():
                output, (h, c) = self.rnn(embedded, (state[0].contiguous(), state[1].contiguous()))
            state = torch.stack([h, c])
        else:
            output, h = self.rnn(embedded, state[0].contiguous())
            state = h[None]
        output = self.dropout(output).flatten(0, 1)
        log_prob = adaptive_log_prob(self.softmax, output, targets.flatten())
        return log_prob.view_as(targets), state.detach().float()


Network = LanguageModel | Transformer


def create_model(config: ModelConfig | TransformerConfig, words: int, window: int) -> Network:
    """The network of `config` for a vocabulary of `words` words; a Transformer sees `window` tokens.

    Raises ValueError for cutoffs that do not fit the vocabulary.
    """
    if isinstance(config, TransformerConfig):
        return Transformer(config, words, window)
    return LanguageModel(words, config.name, **config.model_dump(exclude={"name"}))


@cache
def cpu_has_bf16_lstm() -> bool:
    """Whether an LSTM runs in bfloat16 on this processor. If not, it stays in float32 while the rest is in bfloat16.

    On x86, oneDNN's bfloat16 LSTM needs AVX-512, and torch calls it without checking that.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        except RuntimeError:
            return False
    return True
