"""The decoder-only Transformer: causal, tied, scored in windows; its runs are killed, resumed, divided over ranks."""

import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import Cell, assert_same_end, losses, metrics, result, saved

from engine.config import load_config
from engine.distributed import setup
from engine.precision import Precision
from language_model import evaluate as evaluate_command
from language_model.config import Config, ModelConfig, TransformerConfig
from language_model.data import read_text
from language_model.model import LanguageModel, create_model
from language_model.scoring import score
from language_model.softmax import adaptive_log_prob
from language_model.toy_text import paragraphs, pydoc_corpus
from language_model.transformer import (
    Layer,
    Transformer,
    rotary_angles,
    rotated,
    word_vectors,
)

WORDS, WINDOW = 100, 8
SETTINGS = {"name": "transformer", "width": 16, "inner_width": 24, "layers": 2, "heads": 2, "cutoffs": [10, 50]}


def small(window: int = WINDOW, **settings) -> Transformer:
    torch.manual_seed(0)
    return create_model(TransformerConfig(**SETTINGS | {"dropout": 0.0} | settings), WORDS, window)


def tokens_of(steps: int, rows: int = 3) -> torch.Tensor:
    return torch.randint(WORDS, (steps, rows), generator=torch.Generator().manual_seed(1))


def test_size():
    layer = 4 * 16 * 16 + 2 * 16 * 24 + 2 * 16
    softmax = 16 * (10 + 2) + (16 + 40) * 4 + (16 + 50) * 1
    assert sum(parameter.numel() for parameter in small().parameters()) == softmax + 2 * layer + 16


@pytest.mark.parametrize("changed", [1, 4, 7])
def test_a_later_token_changes_nothing_before_it(changed):
    model, tokens, targets = small(), tokens_of(WINDOW), tokens_of(WINDOW).flip(0)
    other = tokens.clone()
    other[changed, 1] = (other[changed, 1] + 1) % WORDS
    before, _ = model(tokens, targets, model.zero_state(3))
    after, _ = model(other, targets, model.zero_state(3))
    is_changed = (before != after).nonzero().tolist()
    assert [step for step, row in is_changed if row == 1] == list(range(changed, WINDOW))
    assert {row for _, row in is_changed} == {1}


def test_the_gradient_of_a_prediction_stops_at_its_token():
    model, x = small(), torch.randn(1, WINDOW, 16, requires_grad=True)
    out = x
    for layer in model.layers:
        out = layer(out, rotary_angles(WINDOW, 8, x.device))
    (gradient,) = torch.autograd.grad(out[0, 4].sum(), x)
    assert (gradient[0, :5].abs().sum(-1) > 0).all() and (gradient[0, 5:] == 0).all()


def test_a_layer_is_its_formula():
    torch.manual_seed(0)
    layer, x = Layer(TransformerConfig(**SETTINGS)).eval(), torch.randn(2, 5, 16)
    angles = rotary_angles(5, 8, x.device)
    normed = layer.attention_norm(x)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        q, k, v = ((normed @ p.weight.T)[..., head] for p in (layer.query, layer.key, layer.value))
        scores = rotated(q, angles) @ rotated(k, angles).mT / math.sqrt(8)
        heads.append(scores.masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf).softmax(-1) @ v)
    attended = x + torch.cat(heads, -1) @ layer.out.weight.T
    inner = torch.nn.functional.gelu(layer.inner_norm(attended) @ layer.widen.weight.T)
    torch.testing.assert_close(layer(x, angles), attended + inner @ layer.narrow.weight.T)


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 8).expand(2, 6, 8).unbind(0)
    angles = rotary_angles(6, 8, query.device)
    scores = rotated(query, angles) @ rotated(key, angles).T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-3
    torch.testing.assert_close(rotated(query, angles).norm(dim=-1), query.norm(dim=-1))
    assert rotated(query.bfloat16(), angles).dtype == torch.bfloat16


def test_words_have_one_vector_for_input_and_output():
    """The scores of the words before normalisation are the products with the vectors that the input has."""
    model = small()
    softmax, hidden = model.softmax, torch.randn(16)
    vectors = word_vectors(softmax, torch.arange(WORDS))
    torch.testing.assert_close(vectors[:10] @ hidden, softmax.head(hidden)[:10])
    torch.testing.assert_close(vectors[10:50] @ hidden, softmax.tail[0](hidden))
    torch.testing.assert_close(vectors[50:] @ hidden, softmax.tail[1](hidden))
    (gradient,) = torch.autograd.grad(vectors[:50].sum(), softmax.tail[1][1].weight, allow_unused=True)
    assert (gradient == 0).all()  # a cluster without words gets zeros, so that all ranks agree


def test_tied_weights_are_one_parameter_to_the_optimizer():
    """A step on the loss changes a word's vector for input and output alike, by the sum of both gradients."""
    model, tokens = small(), torch.full((2, 1), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = [parameter.data_ptr() for group in optimizer.param_groups for parameter in group["params"]]
    assert len(set(held)) == len(held) == len(model.state_dict()) and held.count(model.softmax.head.weight.data_ptr())
    before = word_vectors(model.softmax, tokens)[0, 0].detach()
    log_prob, _ = model(tokens, tokens, model.zero_state(1))
    (-log_prob.mean()).backward()
    gradient = model.softmax.head.weight.grad[3].clone()
    optimizer.step()
    torch.testing.assert_close(word_vectors(model.softmax, tokens)[0, 0], before - 0.1 * gradient)
    torch.testing.assert_close(model.softmax.head.weight[3], before - 0.1 * gradient)

    as_output = adaptive_log_prob(model.softmax, torch.ones(1, 16), tokens[0])
    (of_output,) = torch.autograd.grad(as_output.sum(), model.softmax.head.weight)
    (of_input,) = torch.autograd.grad(word_vectors(model.softmax, tokens).sum(), model.softmax.head.weight)
    assert (of_output[3] != 0).any() and (of_input[3] == 2).all() and gradient.abs().sum() > 0


def test_initialisation_keeps_the_variance():
    torch.manual_seed(0)
    config = TransformerConfig(name="transformer", width=256, inner_width=512, layers=4, heads=4, cutoffs=[500, 1500])
    model = Transformer(config, 3000, 16).eval()
    vectors = word_vectors(model.softmax, torch.arange(3000))
    for words in (vectors[:500], vectors[500:1500], vectors[1500:]):
        assert words.std().item() == pytest.approx(256**-0.5, rel=0.1)
    layer = model.layers[0]
    for matrix in (layer.query, layer.key, layer.value, layer.widen):
        assert matrix.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert layer.out.weight.std().item() == pytest.approx((256 * 8) ** -0.5, rel=0.02)
    assert layer.narrow.weight.std().item() == pytest.approx((512 * 8) ** -0.5, rel=0.02)
    tokens = torch.randint(3000, (16, 8))
    with torch.no_grad():
        log_prob, _ = model(tokens, tokens.flip(0), model.zero_state(8))
    # Normal scores of variance 1 add 1/2 to the loss, in the head and in a cluster. The head has 502 entries.
    of_word = [math.log(502) + 0.5, math.log(502) + math.log(1000) + 1, math.log(502) + math.log(1500) + 1]
    assert -log_prob.mean().item() == pytest.approx((of_word[0] + 2 * of_word[1] + 3 * of_word[2]) / 6, rel=0.05)


@pytest.mark.parametrize("window", [8, 7, 2, 1])
def test_each_token_is_scored_once_from_the_last_half_window_or_more(window):
    """Against a literal computation: one forward pass for each token, over the context that it is said to have."""
    model, generator = small(window).eval(), np.random.default_rng(0)
    lengths = generator.integers(2, 12, 9)
    tokens = generator.integers(0, WORDS, lengths.sum()).astype(np.int64)
    stride, rows = window - window // 2, 3
    expected, counted = 0.0, 0
    ends = np.cumsum(lengths)
    cuts = [0, *np.unique(ends[np.searchsorted(ends, np.linspace(0, ends[-1], rows + 1)[1:])])]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        row = torch.from_numpy(np.concatenate([tokens[[start - 1]], tokens[start:stop]]))
        for place in range(len(row) - 1):
            first = max(0, place // stride * stride - window // 2)
            context, target = row[first : place + 1, None], row[first + 1 : place + 2, None]
            assert min(place + 1, window // 2 + 1) <= len(context) <= window
            with torch.no_grad():
                log_prob, _ = model(context, target, model.zero_state(1))
            expected, counted = expected - log_prob[-1].item(), counted + 1
    total = score(model, tokens, lengths, rows, Precision("fp32", torch.device("cpu")), setup("cpu"))
    assert total["tokens"] == counted == len(tokens)
    assert total["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_test_text_has_the_lstms_denominator():
    corpus = pydoc_corpus()
    precision, world = Precision("fp32", torch.device("cpu")), setup("cpu")
    torch.manual_seed(0)
    transformer = Transformer(TransformerConfig(**SETTINGS), corpus.words, 20)
    lstm = LanguageModel(ModelConfig(name="lstm", embedding=8, hidden=16, cutoffs=[10, 50]), corpus.words)
    found = [score(model, *read_text(corpus.test), 32, precision, world) for model in (transformer, lstm)]
    assert found[0]["tokens"] == found[1]["tokens"] == sum(shard.tokens for shard in corpus.test)


def test_training_carries_nothing_on():
    model, tokens = small(), tokens_of(WINDOW)
    _, state = model(tokens, tokens, model.zero_state(3))
    assert state.shape == model.zero_state(3).shape == (1, 1, 3, 0)
    model.eval()
    _, state = model(tokens, tokens, model.zero_state(3))
    assert torch.equal(state[0, 0], tokens[-WINDOW // 2 :].T)


CONFIG = """
table: pydoc_topics
row: adamw
epochs: 2
batch: 32
sequence_length: 32
data: {name: pydoc_topics}
model: {name: transformer, width: 32, inner_width: 64, layers: 2, heads: 2, dropout: 0.1, cutoffs: [300, 1000]}
log_every: 1
gradient_clip: 1.0
optimizer: {name: adamw, lr: 0.01}
schedule: {name: torch.optim.lr_scheduler.OneCycleLR, max_lr: 0.01, total_steps: 200, warmup_updates: 10, init_lr: 0.0}
checkpoint: {minutes: 0, keep: 2}
"""


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Cell:
    path = tmp_path_factory.mktemp("config") / "cell.yaml"
    path.write_text(CONFIG)
    return Cell("language_model.train", path)


@pytest.fixture(scope="module")
def uninterrupted(cell, tmp_path_factory) -> Path:
    return cell.complete(tmp_path_factory.mktemp("uninterrupted") / "run")


def test_it_learns(uninterrupted):
    curve, outcome = losses(uninterrupted), result(uninterrupted)
    assert curve[0] > 5 and curve[-1] < curve[0] - 1.5
    assert outcome["final"] < 0.1 * outcome["vocabulary"]
    assert outcome["parameters"] == sum(tensor.numel() for tensor in saved(uninterrupted)["model"].values())
    rates = [line["lr"] for line in metrics(uninterrupted, "train")]
    assert rates[:11] == pytest.approx([0.01 / 25 * t / 10 for t in range(11)])  # div_factor is 25
    assert max(rates) == pytest.approx(0.01, rel=0.01)


def test_killed_in_the_warmup_and_behind_it_ends_the_same(cell, uninterrupted, tmp_path):
    for at_update in (5, len(losses(uninterrupted)) // 2 + 10):
        killed = cell.interrupt(tmp_path / "run", at_update=at_update, number=signal.SIGKILL)
        assert killed.status == -signal.SIGKILL and not (tmp_path / "run/result.json").exists()
    assert_same_end(uninterrupted, cell.complete(tmp_path / "run"))


def test_two_ranks_take_the_same_updates(cell, tmp_path):
    passes = ("batch=16", "passes=2", "epochs=1", "checkpoint.minutes=60")
    one, two = (cell.complete(tmp_path / str(ranks), *passes, ranks=ranks) for ranks in (1, 2))
    assert len(losses(one)) > 50 and losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert result(two)["evaluated"] == result(one)["evaluated"]
    assert result(two)["final"] == pytest.approx(result(one)["final"], rel=1e-2)


@pytest.mark.parametrize("table", ["pydoc_topics_transformer", "news_transformer"])
def test_muon_gets_the_matrices_of_the_layers_and_nothing_else(table):
    path = Path(__file__).parent.parent / "configs" / table / "muon_adamw.yaml"
    config = load_config(Config, path)
    (group,) = config.model_dump()["optimizer"]["groups"]
    with torch.device("meta"):
        model = create_model(config.model, 20_000, config.sequence_length)
    matched = [name for name, _ in model.named_parameters() if re.search(group["match"], name)]
    assert matched == [name for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    assert len(matched) == 6 * config.model.layers


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16"],
        ["precision=fp16", "sequence_length=33"],
        ["optimizer={name: apollo, lr: 10.0, eps: 1.0e-4}", "schedule={name: wsd, warmup_updates: 20}"],
        ["optimizer={name: torch.optim.RAdam, lr: 0.01}", "schedule={name: linear, warmup_updates: 20}"],
    ],
)
def test_other_precisions_and_methods_learn(cell, tmp_path, overrides):
    run_dir = cell.complete(tmp_path / "run", "epochs=1", "checkpoint.minutes=60", *overrides)
    assert result(run_dir)["final"] < 0.25 * result(run_dir)["vocabulary"]


def test_a_file_is_scored_as_the_test_text_was(uninterrupted, tmp_path, capsys):
    (tmp_path / "text").write_text("\n".join(paragraphs()[9::10]) + "\n", encoding="utf-8")
    evaluate_command.main([str(uninterrupted), str(tmp_path / "text")])
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["perplexity, both marks"]) == pytest.approx(result(uninterrupted)["final"], abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=3"], ["model: width must be an even multiple of heads, not 32 and 3"]),
        (["model.hidden=32"], ["unknown key 'model.hidden'", "inner_width"]),
        (["model.name=transfomer"], ["model.name should be one of 'lstm',", "'transformer', not 'transfomer'"]),
        (["model={width: 32}"], ["the key 'model.name' is missing"]),
        (["model.name=lstm"], ["unknown key 'model.width'"]),
        (["model.cutoffs=[300, 60000]"], ["model: cutoffs=[300, 60000]", "words"]),
        (["schedule.total_steps=100"], ["OneCycleLR' ends after total_steps=100"]),
        (["schedule={name: torch.optim.lr_scheduler.StepLT}"], ["did you mean 'StepLR'"]),
    ],
)
def test_bad_input_is_refused_in_one_line(cell, tmp_path, overrides, words):
    message = cell.refusal(tmp_path / "run", *overrides)
    assert all(word in message for word in words), message
