"""The native relu(batch_norm(x) + shortcut) against torch's own operators in float64."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

from classification.models import create_model
from classification.native.norm_relu import library, norm_relu
from optim import native
from optim.native import NotCompiled


def random_norm(channels):
    norm = torch.nn.BatchNorm2d(channels, eps=1e-3, momentum=0.2)
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.normal_()
    return norm


def channels_last(*shape, dtype):
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def passes(norm, x, shortcut, grad, apply):
    x = x.detach().clone().requires_grad_()
    shortcut = None if shortcut is None else shortcut.detach().clone().requires_grad_()
    y = apply(norm, x, shortcut)
    y.backward(grad)
    results = {"y": y.detach(), "grad_x": x.grad, "grad_weight": norm.weight.grad, "grad_bias": norm.bias.grad}
    results |= {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return results if shortcut is None else results | {"grad_shortcut": shortcut.grad}


def in_float64(norm, x, shortcut):
    out = norm(x.double())
    return F.relu(out if shortcut is None else out + shortcut.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(7, 16, 33, 5), (128, 32, 8, 8), (9, 64, 1, 1), (3, 80, 9, 9)])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_equals_torch(shape, with_shortcut, dtype, mean):
    torch.manual_seed(0)
    x = (channels_last(*shape, dtype=dtype) * 3 + mean).detach()
    shortcut, grad = (channels_last(*shape, dtype=dtype) for _ in range(2))
    shortcut = shortcut if with_shortcut else None
    norm = random_norm(shape[1])
    expected = passes(copy.deepcopy(norm).double(), x, shortcut, grad, in_float64)
    found = passes(norm, x, shortcut, grad, norm_relu)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        is_activation = name in ("y", "grad_x", "grad_shortcut")
        assert value.dtype == (dtype if is_activation else value.dtype)
        scale = expected[name].abs().max().item()
        tolerance = 1e-2 if is_activation and dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_its_gradients_have_gradients(with_shortcut):
    """For a backward pass with create_graph it takes torch's operators."""
    torch.manual_seed(0)
    norm, convolution, x = random_norm(16), torch.nn.Conv2d(16, 16, 3), channels_last(4, 16, 7, 7, dtype=torch.float32)
    shortcut = channels_last(4, 16, 5, 5, dtype=torch.float32) if with_shortcut else None
    draws = [torch.randn_like(weight) for weight in (convolution.weight, norm.weight, norm.bias)]

    def products(apply, norm, convolution):
        """Of the Hessian of a loss with `draws`."""
        weights = (convolution.weight, norm.weight, norm.bias)
        loss = apply(norm, convolution(x.to(norm.weight)), shortcut).double().pow(3).sum()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(gradients, weights, [draw.to(norm.weight) for draw in draws])

    expected = products(in_float64, *(copy.deepcopy(module).double() for module in (norm, convolution)))
    for found, true in zip(products(norm_relu, norm, convolution), expected, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-4 * true.abs().max().item())


def test_is_used_by_the_cifar_resnet_in_training_on_channels_last_alone():
    assert library() is not None, "no compiler here, so nothing was tested"
    model, images = create_model("resnet", 10, 8), torch.randn(4, 3, 32, 32)

    def native_layers(output):
        seen, todo = set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return sum("_NormRelu" in node.name() for node in seen)

    assert native_layers(model(images)) == 0
    model.to(memory_format=torch.channels_last)
    assert native_layers(model(images.to(memory_format=torch.channels_last))) == 7
    assert native_layers(model.eval()(images.to(memory_format=torch.channels_last))) == 0


def test_does_not_depend_on_the_number_of_threads():
    x, grad = (channels_last(64, 16, 32, 32, dtype=torch.float32) for _ in range(2))
    norm, before = random_norm(16), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(passes(copy.deepcopy(norm), x, x, grad, norm_relu))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_goes_through(dtype):
    """A NaN must not disappear, or nobody would see that the loss is not finite."""
    x = channels_last(4, 16, 4, 4, dtype=dtype)
    x[1, 3, 2, 2] = float("nan")
    y = norm_relu(random_norm(16), x.requires_grad_())
    y.sum().backward()
    assert y[:, 3].isnan().all() and not y[:, 4].isnan().any()
    assert x.grad[:, 3].isnan().all() and not x.grad[:, 4].isnan().any()


@pytest.mark.parametrize("which", ["x", "weight"])
def test_what_is_changed_between_the_passes_is_refused(which):
    x, norm = channels_last(4, 16, 4, 4, dtype=torch.float32).requires_grad_(), random_norm(16)
    y = norm_relu(norm, x)
    changed = x if which == "x" else norm.weight
    changed.data = changed.data[:1].clone()
    with pytest.raises(RuntimeError, match="got another shape or dtype after forward"):
        y.sum().backward()


def test_a_norm_that_does_not_fit_is_torchs_to_refuse():
    x, norm = channels_last(4, 16, 4, 4, dtype=torch.float32), random_norm(16)
    norm.running_mean = norm.running_mean[:3]
    with pytest.raises(RuntimeError, match="running_mean should contain 16 elements"):
        norm_relu(norm, x)


def test_without_a_compiler_one_warning_and_torch(monkeypatch):
    def refuse(source):
        raise NotCompiled("no C++ compiler found")

    monkeypatch.setattr(native, "compile_library", refuse)
    library.cache_clear()
    try:
        x, norm = channels_last(4, 16, 4, 4, dtype=torch.float32), random_norm(16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first, second = norm_relu(copy.deepcopy(norm), x), norm_relu(copy.deepcopy(norm), x)
        assert [str(w.message).count("no C++ compiler found") for w in caught] == [1]
        assert torch.equal(first, second) and torch.equal(first, F.relu(copy.deepcopy(norm)(x)))
    finally:
        library.cache_clear()
