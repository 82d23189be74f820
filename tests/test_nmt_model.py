"""The Transformer against torch's, decoding word by word against whole sentences, the loss against torch's."""

import math
import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from engine.config import ConfigError, load_config
from nmt import loss as loss_module
from nmt.attention import Attention
from nmt.codec import BOS, EOS, PAD
from nmt.dropout import Dropout
from nmt.loss import smoothed_cross_entropy
from nmt.model import ModelConfig, create_model, sinusoids
from nmt.rows import rounded

WORDS = 40
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
SMALL = ModelConfig(width=16, inner_width=24, heads=4, encoder_layers=2, decoder_layers=3, **NO_DROPOUT)


def small_model(norm="post", **settings):
    torch.manual_seed(0)
    model = create_model(SMALL.model_copy(update={"norm": norm, **settings}), WORDS)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and normalisations that do something
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def sentences(*lengths, end=EOS, seed=1):
    """Random ids ending with `end`, padded: [B, longest + 1]."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.cat((torch.randint(4, WORDS, (n,), generator=random), torch.tensor([end]))) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def targets(*lengths):
    target_out = sentences(*lengths, seed=2)
    target_in = torch.cat((torch.full((len(lengths), 1), BOS), target_out[:, :-1]), 1)
    return target_in.masked_fill(target_in == EOS, PAD), target_out


def test_transformer_base_has_the_published_size():
    with torch.device("meta"):
        model = create_model(ModelConfig(), 37_000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_082_496 == 44_138_496 + 37_000 * 512
    assert {name for name in model.state_dict() if "embed" in name} == {"embedding.weight"}


def torch_transformer(model):
    config = model.config
    theirs = torch.nn.Transformer(
        config.width, config.heads, config.encoder_layers, config.decoder_layers, config.inner_width, dropout=0.0,
        batch_first=True, norm_first=config.norm == "pre",
    )  # fmt: skip
    theirs.encoder.norm, theirs.decoder.norm = model.encoder_norm, model.decoder_norm

    def copy(into, *modules):
        for name in ("weight", "bias"):
            whole = getattr(into, f"in_proj_{name}") if isinstance(into, torch.nn.MultiheadAttention) else None
            ours = torch.cat([getattr(module, name) for module in modules])
            (getattr(into, name) if whole is None else whole).data.copy_(ours)

    with torch.no_grad():
        for mine, other in zip([*model.encoder, *model.decoder], [*theirs.encoder.layers, *theirs.decoder.layers]):  # noqa: B905
            own = mine.self_attention
            copy(other.self_attn, own.query, own.key, own.value)
            copy(other.self_attn.out_proj, own.output)
            copy(other.linear1, mine.feed_forward.inner)
            copy(other.linear2, mine.feed_forward.outer)
            norms = [module.norm for name, module in mine.named_children() if name.endswith("residual")]
            if hasattr(mine, "cross_attention"):
                cross = mine.cross_attention
                copy(other.multihead_attn, cross.query, cross.key, cross.value)
                copy(other.multihead_attn.out_proj, cross.output)
                norms = [mine.self_residual.norm, mine.cross_residual.norm, mine.feed_forward_residual.norm]
            else:
                norms = [mine.attention_residual.norm, mine.feed_forward_residual.norm]
            for number, norm in enumerate(norms, 1):
                copy(getattr(other, f"norm{number}"), norm)
    return theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_it_computes_what_torchs_transformer_does(norm, training):
    """In training on the CPU attention is plain operations, in evaluation torch's fused kernel. Both are compared."""
    model = small_model(norm).train(training)
    source, (target_in, _) = sentences(6, 3, 5), targets(4, 7, 1)
    scale, table = math.sqrt(16), sinusoids(16, 16, torch.device("cpu"))
    embed = lambda words: model.embedding(words) * scale + table[: words.shape[1]]  # noqa: E731
    padded = source == PAD
    theirs = torch_transformer(model)(
        embed(source), embed(target_in), src_key_padding_mask=padded, memory_key_padding_mask=padded,
        tgt_mask=torch.ones(8, 8, dtype=torch.bool).triu(1),
    ) @ model.embedding.weight.T  # fmt: skip
    with torch.set_grad_enabled(training):
        ours = model(source, target_in)
    real = target_in != PAD
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_positions_are_the_published_sinusoids():
    """Word 0 has position 2. Width 8 has the four wavelengths 2 pi * 10,000 ** (i / 3), sines before cosines."""
    table = sinusoids(300, 8, torch.device("cpu"))
    for word in (0, 1, 77, 299):
        angles = [(word + 2) / 10_000 ** (i / 3) for i in range(4)]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        torch.testing.assert_close(table[word], expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_begins_as_published():
    """Mean and standard deviation of each, for d = 512, f = 2048. Uniform on -b ... b has the deviation b / sqrt 3.

    embedding      normal(0, 1 / sqrt d)                                           deviation 0.0441942
    query key value  weight: Xavier-uniform, gain 1 / sqrt 2:
                     b = sqrt(6 / (d + d)) / sqrt 2             b = 0.0541266     deviation 0.03125
                   bias: torch.nn.Linear's, b = 1 / sqrt d      b = 0.0441942     deviation 0.0255155
    output         weight: Xavier-uniform, gain 1:
                     b = sqrt(6 / (d + d))                      b = 0.0765466     deviation 0.0441942
                   bias: 0
    inner          torch.nn.Linear's, b = 1 / sqrt d            b = 0.0441942     deviation 0.0255155
    outer          torch.nn.Linear's, b = 1 / sqrt f            b = 0.0220971     deviation 0.0127578
    norm           weight 1, bias 0
    """
    torch.manual_seed(0)
    model = create_model(ModelConfig(encoder_layers=2, decoder_layers=2), 2000)
    qkv = r"(query|key|value)"
    published = {  # mean, standard deviation, greatest absolute value where there is one
        r"embedding\.weight": (0, 0.0441942, None),
        rf"attention\.{qkv}\.weight": (0, 0.03125, 0.0541266),
        rf"attention\.{qkv}\.bias": (0, 0.0255155, 0.0441942),
        r"attention\.output\.weight": (0, 0.0441942, 0.0765466),
        r"attention\.output\.bias": (0, 0, 0),
        r"feed_forward\.inner\.(weight|bias)": (0, 0.0255155, 0.0441942),
        r"feed_forward\.outer\.(weight|bias)": (0, 0.0127578, 0.0220971),
        r"norm\.weight": (1, 0, 1),
        r"norm\.bias": (0, 0, 0),
    }
    for name, tensor in model.named_parameters():
        ((mean, deviation, bound),) = [values for end, values in published.items() if re.search(f"{end}$", name)]
        tensor = tensor[1:] if name == "embedding.weight" else tensor
        # Within five standard errors: s / sqrt n of the mean, at most s / sqrt 2n of the deviation.
        assert tensor.mean().item() == pytest.approx(mean, abs=1e-9 + 5 * deviation / tensor.numel() ** 0.5), name
        error = 1e-9 + 5 * deviation / (2 * tensor.numel()) ** 0.5
        assert tensor.std(correction=0).item() == pytest.approx(deviation, abs=error), name
        assert bound is None or 0.97 * bound <= tensor.abs().max().item() <= bound * (1 + 1e-5), name
    assert model.embedding.weight[PAD].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_word_by_word_equals_whole_sentences(norm):
    model = small_model(norm).eval()
    source, target_in = sentences(6, 3, 5), sentences(70, 70, 70, seed=3)  # longer than the caches' first room
    whole = model(source, target_in)
    state = model.start(source, 1)
    steps = torch.cat([model.step(target_in[:, t : t + 1], state) for t in range(71)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hypotheses_keep_to_their_own_ancestors():
    """Parents are random at every step, and sentences leave. Each hypothesis must see only its own words."""
    model = small_model().eval()
    source, k = sentences(6, 3, 5, 4), 3
    state = model.start(source, k)
    random = torch.Generator().manual_seed(5)
    history = torch.empty(4, k, 0, dtype=torch.int64)
    for step in range(40):
        words = torch.randint(4, WORDS, (len(source), k), generator=random)
        history = torch.cat((history, words[..., None]), 2)
        logits = model.step(words, state)
        whole = model(source.repeat_interleave(k, 0), history.flatten(0, 1))[:, -1].unflatten(0, (-1, k))
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
        parents = torch.randint(k, (len(source), k), generator=random)
        state.reorder(parents)
        history = history.gather(1, parents[..., None].expand_as(history))
        if step in (10, 33):
            kept = torch.tensor([0, 2, 3] if step == 10 else [2])
            state.keep(kept)
            source, history = source[kept], history[kept]


@torch.no_grad()
def test_padding_and_later_words_change_nothing():
    model = small_model().eval()
    source, (target_in, _) = sentences(6, 3), targets(7, 4)
    together = model(source, target_in)
    alone = model(source[1:, :4], target_in[1:, :5])
    torch.testing.assert_close(together[1:, :5], alone, rtol=1e-4, atol=1e-5)
    changed = target_in.clone()
    changed[:, 4] = 9
    assert torch.equal(model(source, changed)[:, :4], together[:, :4])


def plain_loss(model, source, target_in, target_out, label_smoothing):
    logits, words = model(source, target_in).flatten(0, 1), target_out.flatten()
    settings = {"ignore_index": PAD, "reduction": "sum"}
    return (
        cross_entropy(logits, words, label_smoothing=label_smoothing, **settings),
        cross_entropy(logits, words, **settings),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_without_the_padding(label_smoothing, monkeypatch):
    monkeypatch.setitem(loss_module.BLOCK_ELEMENTS, "cpu", 3 * WORDS)  # blocks of three words
    model = small_model().train()
    source, (target_in, target_out) = sentences(6, 3, 5), targets(4, 7, 1)
    ours, nll = model(source, target_in, target_out, 15, label_smoothing)
    theirs, their_nll = plain_loss(model, source, target_in, target_out, label_smoothing)
    torch.testing.assert_close((ours, nll), (theirs, their_nll))
    assert not nll.requires_grad
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, mine, other in zip(
        names, torch.autograd.grad(0.3 * ours, parameters), torch.autograd.grad(0.3 * theirs, parameters), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(model(source, target_in, target_out, 15, label_smoothing), (theirs, their_nll))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_the_loss_in_half_precision(dtype, tolerance):
    """With 10,000 words the probabilities are near the least that float16 can hold."""
    torch.manual_seed(0)
    weight = torch.randn(10_000, 32, requires_grad=True)
    hidden = (0.3 * torch.randn(50, 32)).requires_grad_()
    words = torch.randint(10_000, (50,))
    with torch.autocast("cpu", dtype):
        ours, nll = smoothed_cross_entropy(hidden, weight, words, 0.1)
    theirs = cross_entropy(hidden @ weight.T, words, reduction="sum", label_smoothing=0.1)
    assert ours.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < tolerance * other.norm()


def test_rows_come_in_eight_sizes_to_a_power_of_two():
    cpu = torch.device("cpu")
    sizes = {rows: rounded(rows, torch.bfloat16, cpu) for rows in range(5000)}
    assert all(rows <= size <= 1.125 * rows for rows, size in sizes.items())
    assert len({size for size in sizes.values() if 1024 < size <= 2048}) == 8
    assert all(rounded(rows, torch.float32, cpu) == rows for rows in (1, 999, 1001))
    assert rounded(1001, torch.bfloat16, torch.device("cuda")) == 1001


def test_idle_rows_change_nothing():
    """In bfloat16 the 3 x 9 and 3 x 8 words take 28 and 24 rows."""
    model = small_model().train()
    source, (target_in, target_out) = sentences(8, 3, 5), targets(4, 7, 1)
    parameters = list(model.parameters())
    loss, nll = model(source, target_in, target_out, 15, 0.1)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_nll = model(source, target_in, target_out, 15, 0.1)
        assert model.encode(source)[0].shape == (28, 16)
        logits = model(source, target_in)
    torch.testing.assert_close((half_loss, half_nll), (loss, nll), rtol=0.03, atol=0)
    torch.testing.assert_close(logits.float(), model(source, target_in), rtol=0.1, atol=0.2)
    half_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(half_loss, parameters)])
    gradients = torch.cat([g.flatten() for g in gradients])
    assert (half_gradients - gradients).norm() < 0.05 * gradients.norm()


def test_a_pass_without_words_has_no_loss_and_no_gradient():
    model = small_model().train()
    source, target_in, target_out = torch.tensor([[[EOS]], [[BOS]], [[PAD]]])
    loss, nll = model(source, target_in, target_out, 0, 0.1)
    loss.backward()
    assert loss.item() == nll.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_scales_the_rest(p, dtype):
    dropout = Dropout(p)
    x = torch.ones(1001, 333, dtype=dtype, requires_grad=True)  # not a multiple of the four that a random number serves
    torch.manual_seed(0)
    y = dropout(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y) and torch.equal(gradient, y.detach())
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=0.003)
    for dim in (0, 1):  # no row or column is special
        assert (dropped.float().mean(dim) - p).abs().max() < 6 * math.sqrt(p * (1 - p) / x.shape[dim])
    assert y[~dropped].unique().numel() == 1
    assert y[~dropped][0].item() == pytest.approx(1 / (1 - p), rel=4e-3)
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_attention_dropout_is_active_in_training_alone():
    attention = Attention(16, 4, 0.5)
    q, k, v = torch.randn(3, 2, 4, 6, 4).unbind()
    q.requires_grad_()
    torch.manual_seed(0)
    one, other = attention.attend(q, k, v, None), attention.attend(q, k, v, None)
    assert not torch.equal(one, other)
    attention.eval()
    assert torch.equal(attention.attend(q, k, v, None), attention.attend(q, k, v, None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("width: 30, heads: 4", "width must be even and divisible by heads, not 30 and 4"),
        ("dropout: 1.0", "model.dropout"),
        ("norm: middle", "model.norm"),
        ("layers: 3", "unknown key 'model.layers'"),
    ],
)
def test_settings_that_make_no_model_are_refused(tmp_path, settings, words):
    from nmt.train import Config

    path = tmp_path / "cell.yaml"
    path.write_text(
        "table: t\nrow: r\nupdates: 1\nvalidate_every: 1\naverage: {every: 1}\nbatch: 1\n"
        f"optimizer: {{name: sgd, lr: 1.0}}\ndata: {{name: d, root: r}}\nmodel: {{{settings}}}\n"
    )
    with pytest.raises(ConfigError, match="^[^\n]+$") as error:
        load_config(Config, path)
    assert words in str(error.value)
