"""The language model: its size, its initialisation, its adaptive softmax against torch's own, its state."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from language_model.config import ModelConfig
from language_model.model import LanguageModel, cpu_has_bf16_lstm
from language_model.softmax import adaptive_log_prob

SMALL = {"embedding": 12, "hidden": 16, "layers": 2, "dropout": 0.0, "cutoffs": [10, 50]}
WORDS = 100


def language_model(words: int = WORDS, cell: str = "lstm", **settings) -> LanguageModel:
    return LanguageModel(ModelConfig(name=cell, **settings), words)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_published_model_has_its_size():
    with torch.device("meta"):
        model = language_model(793_470, cutoffs=[60_000, 100_000, 640_000])
    words, hidden = 793_470, 2048
    lstm = 4 * hidden * (300 + hidden + 2) + 4 * hidden * (hidden + hidden + 2)
    head = hidden * (60_000 + 3)
    tails = sum((hidden + size) * width for width, size in ((512, 40_000), (128, 540_000), (32, words - 640_000)))
    assert count(model) == words * 300 + lstm + head + tails == 509_636_456


@pytest.mark.parametrize(("cell", "gates", "parts"), [("lstm", 4, 2), ("gru", 3, 1), ("rnn", 1, 1)])
def test_cells_have_their_size_and_state(cell, gates, parts):
    model = language_model(WORDS, cell, **SMALL)
    recurrent = gates * 16 * (12 + 16 + 2) + gates * 16 * (16 + 16 + 2)
    softmax = 16 * (10 + 2) + (16 + 40) * 4 + (16 + 50) * 1
    assert count(model) == WORDS * 12 + recurrent + softmax
    tokens = torch.randint(WORDS, (5, 3))
    log_prob, state = model(tokens, tokens, model.zero_state(3))
    assert log_prob.shape == (5, 3) and state.shape == (parts, 2, 3, 16) and not state.requires_grad


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = language_model(2000, embedding=150, hidden=64, cutoffs=[100])
    bound = (6 / 150) ** 0.5
    assert 0.99 * bound < model.embedding.weight.abs().max() <= bound
    for name, parameter in model.rnn.named_parameters():
        if "bias" in name:
            gates = parameter.chunk(4)
            assert [gate.unique().tolist() for gate in gates] == [[0.0], [1.0], [0.0], [0.0]], name
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.99 * bound < parameter.abs().max() <= bound, name
    assert all(
        (parameter == 0).all()
        for n, parameter in language_model(WORDS, "gru", **SMALL).rnn.named_parameters()
        if "bias" in n
    )


@pytest.mark.parametrize("highest", [99, 49, 9, 0])
def test_adaptive_softmax_and_its_gradients_are_torchs(highest):
    """Also if no target is in the last clusters. torch then gives no gradient, this model gives zeros."""
    torch.manual_seed(highest)
    softmax = nn.AdaptiveLogSoftmaxWithLoss(32, WORDS, [10, 50])
    hidden = torch.randn(64, 32, requires_grad=True)
    targets = torch.randint(highest + 1, (64,))
    weights = torch.randn(64)
    inputs = [hidden, *softmax.parameters()]

    theirs = softmax(hidden, targets).output
    expected = torch.autograd.grad(theirs @ weights, inputs, allow_unused=True)
    ours = adaptive_log_prob(softmax, hidden, targets)
    gradients = torch.autograd.grad(ours @ weights, inputs)
    torch.testing.assert_close(ours, theirs)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if other is None else other)


def test_log_probabilities_are_float32_and_sum_to_one_under_autocast():
    torch.manual_seed(0)
    softmax = nn.AdaptiveLogSoftmaxWithLoss(32, WORDS, [10, 50])
    hidden, every = torch.randn(1, 32).expand(WORDS, 32), torch.arange(WORDS)
    exact = adaptive_log_prob(softmax, hidden, every)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = adaptive_log_prob(softmax, hidden.bfloat16(), every)
    assert rounded.dtype == torch.float32
    # In bfloat16 a sum of 100 probabilities of 8 bits each would be off by more.
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-5) and rounded.exp().sum().item() == pytest.approx(
        1, abs=1e-4
    )
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_state_carries_a_text_on(cell, dtype):
    """Two batches are like one batch of twice the length, if the second gets the first's state."""
    torch.manual_seed(0)
    model = language_model(WORDS, cell, **SMALL)
    tokens, targets = torch.randint(WORDS, (2, 12, 3)).unbind(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None), torch.no_grad():
        whole, end = model(tokens, targets, model.zero_state(3))
        first, state = model(tokens[:5], targets[:5], model.zero_state(3))
        second, state = model(tokens[5:], targets[5:], state)
        reset, _ = model(tokens[5:], targets[5:], model.zero_state(3))
    assert state.dtype == whole.dtype == torch.float32
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is None else {"atol": 0.05, "rtol": 0.01}
    torch.testing.assert_close(torch.cat([first, second]), whole, **tolerance)
    torch.testing.assert_close(state, end, **tolerance)
    assert (reset[0] - whole[5]).abs().max() > 0.001


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cutoffs": [10, 100]}, ["cutoffs=[10, 100]", "100 words"]),
        ({"cutoffs": [50, 10]}, ["cutoffs=[50, 10]", "rise"]),
        ({"cutoffs": []}, ["cutoffs=[]"]),
        ({"cutoffs": [10, 20, 30]}, ["hidden=16", "no dimension"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError) as error:
        language_model(WORDS, **SMALL | settings)
    assert all(word in str(error.value) for word in words), error.value


def test_asking_for_a_bf16_lstm_draws_no_random_numbers():
    """A resumed run asks again in its first step. It must go on like a run that does not ask."""
    cpu_has_bf16_lstm.cache_clear()
    before = torch.get_rng_state()
    cpu_has_bf16_lstm()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def autocast_on_cuda():
    """bf16 autocast of CUDA tensors. torch.autocast refuses to turn it on without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize(("cell", "kind"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_on_a_gpu_bf16_is_for_the_softmax_and_nothing_waits(autocast_on_cuda, monkeypatch, cell, kind):
    """The tensors claim to be on a GPU and hold no data: whatever looks at data, and would wait for it, raises."""
    try:
        with FakeTensorMode(), torch.device("cuda"):
            torch.empty(1).uniform_()
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} asks the GPU's driver for random numbers, even where there is no data")
    recurrent, head = [], []

    def stand_in(self, x, before):
        recurrent.append((x.dtype, torch.is_autocast_enabled("cuda")))
        return x.new_zeros(*x.shape[:2], self.hidden_size), before

    monkeypatch.setattr(kind, "forward", stand_in)  # cuDNN's needs a GPU
    with FakeTensorMode(), torch.device("cuda"):
        model = language_model(WORDS, cell, **SMALL | {"dropout": 0.1})
        model.softmax.head.register_forward_hook(lambda _, __, output: head.append((output.device, output.dtype)))
        tokens = torch.zeros(5, 3, dtype=torch.int64)
        log_prob, state = model(tokens, tokens, model.zero_state(3), sizes=[5, 6, 4])
    assert recurrent == [(torch.float32, False)] * 2
    assert head == [(torch.device("cuda", 0), torch.bfloat16)]
    assert log_prob.dtype == state.dtype == torch.float32 and torch.is_autocast_enabled("cuda")


def test_dropout_between_layers_is_a_function_of_the_seed():
    """Also on a GPU, where cuDNN's own would not be: each layer is a module without dropout."""
    assert all(layer.dropout == 0 for layer in language_model(WORDS, **SMALL | {"dropout": 0.5}).rnn)
    model = language_model(WORDS, **SMALL | {"dropout": 0.5})
    tokens, found = torch.randint(WORDS, (5, 3)), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model(tokens, tokens, model.zero_state(3))[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
