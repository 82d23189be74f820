"""The published language model: an embedding, an LSTM (or GRU, or plain RNN), and an adaptive softmax.

The state is one detached float32 tensor [parts, layers, rows, hidden]. An LSTM's parts are h and c; the others have
only h.
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
    """Predicts each token of a text from those before it. ValueError for cutoffs that do not fit `words` words."""

    def __init__(self, config: ModelConfig, words: int) -> None:
        super().__init__()
        self.test_steps = TEST_STEPS
        self.parts = 2 if config.name == "lstm" else 1
        self.hidden = config.hidden
        self.embedding = nn.Embedding(words, config.embedding)
        # One module per layer, with torch's dropout between: to seed cuDNN's in every pass makes the host wait.
        inputs = [config.embedding, *[config.hidden] * (config.layers - 1)]
        self.rnn = nn.ModuleList(CELLS[config.name](width, config.hidden) for width in inputs)
        self.softmax = create_softmax(config.hidden, words, config.cutoffs, config.div_value)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Published: He-uniform embedding, Xavier-uniform recurrent matrices, zero biases. The softmax keeps torch's.

        In both bias vectors of an LSTM's layer, the forget gate's quarter is 1.
        """
        nn.init.kaiming_uniform_(self.embedding.weight)
        for parameter in self.rnn.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
                if self.parts == 2:
                    nn.init.ones_(parameter.data.chunk(4)[1])  # gates: input, forget, cell, output

    def zero_state(self, rows: int) -> Tensor:
        """The state at the start of a text."""
        return self.embedding.weight.new_zeros(self.parts, len(self.rnn), rows, self.hidden, dtype=torch.float32)

    @override(check_signature=False)  # torch declares that forward returns None
    def forward(
        self, tokens: Tensor, targets: Tensor, state: Tensor, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets`, float32 [steps, rows], and the state after the last step.

        `tokens` and the `targets` that follow them: int64 [steps, rows]. Without `sizes`, the targets' cluster_sizes,
        the host waits for a GPU.
        """
        output, after = self.dropout(self.embedding(tokens)), []
        with torch.autocast(output.device.type, enabled=False) if self._needs_float32(output) else nullcontext():
            for layer, (rnn, before) in enumerate(zip(self.rnn, state.unbind(1), strict=True)):
                output = self.dropout(output) if layer else output
                if self.parts == 2:
                    output, ended = rnn(output, (before[0, None].contiguous(), before[1, None].contiguous()))
                    after.append(torch.stack(ended))
                else:
                    output, ended = rnn(output, before.contiguous())
                    after.append(ended[None])
        output = self.dropout(output).flatten(0, 1)
        log_prob = adaptive_log_prob(self.softmax, output, targets.flatten(), sizes)
        return log_prob.view_as(targets), torch.cat(after, 1).detach().float()

    def _needs_float32(self, x: Tensor) -> bool:
        """Whether recurrent layers must not run under the current autocast.

        On CUDA, autocast to bfloat16 gives cuDNN float16 (torch's aten/src/ATen/cudnn/AutocastRNN.cpp), in which small
        gradients underflow. A CPU may lack an LSTM in bfloat16.
        """
        device = x.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.bfloat16:
            return False
        return device == "cuda" or (device == "cpu" and self.parts == 2 and not cpu_has_bf16_lstm())


Network = LanguageModel | Transformer


def create_model(config: ModelConfig | TransformerConfig, words: int, window: int) -> Network:
    """A Transformer sees `window` tokens. ValueError as from the network's class."""
    if isinstance(config, TransformerConfig):
        return Transformer(config, words, window)
    return LanguageModel(config, words)


@cache
def cpu_has_bf16_lstm() -> bool:
    """Whether an LSTM runs in bfloat16 here. On x86, oneDNN's needs AVX-512, and torch calls it without a check."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        except RuntimeError:
            return False
    return True
