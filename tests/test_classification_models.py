"""The CIFAR ResNets: parameter counts, shapes, initialisation, and errors for models that do not exist."""

import math

import pytest
import torch
from torch import nn

from classification.models import BasicBlock, create_model

# 0.27M, 0.46M, 0.66M, 0.85M and 1.7M in He et al. (2016, table 6), without the 2,752 parameters of the two projection
# shortcuts; the last is the published count of the Apollo runs.
PARAMETERS = {20: 272_474, 32: 466_906, 44: 661_338, 56: 855_770, 110: 1_730_714}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "parameters"), PARAMETERS.items())
def test_parameters_and_depth(depth, parameters):
    model = create_model("resnet", 10, depth)
    assert count(model) == parameters
    in_the_main_path = [m for m in model.modules() if isinstance(m, nn.Linear) or _is_3x3(m)]
    assert len(in_the_main_path) == depth


def _is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def test_num_classes_changes_the_last_layer_alone():
    assert count(create_model("resnet", 100, 20)) - count(create_model("resnet", 10, 20)) == 90 * (64 + 1)


def test_shapes_of_the_three_stages():
    model = create_model("resnet", 7, 20).eval()
    x = model.conv1(torch.randn(2, 3, 32, 32))
    shapes = []
    for stage in (model.stage1, model.stage2, model.stage3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    for side in (28, 32, 64):
        assert model(torch.randn(2, 3, side, side)).shape == (2, 7)


def test_shortcuts_are_projections_only_where_the_shape_changes():
    blocks = [m for m in create_model("resnet", 10, 20).modules() if isinstance(m, BasicBlock)]
    projections = [isinstance(block.shortcut, nn.Sequential) for block in blocks]
    assert projections == [False] * 3 + [True, False, False] * 2
    conv, norm = blocks[3].shortcut
    assert conv.kernel_size == (1, 1) and conv.stride == (2, 2) and conv.bias is None
    assert isinstance(norm, nn.BatchNorm2d)


def test_block_against_its_formula():
    block = BasicBlock(4, 8, stride=2).double().eval()
    for norm in (block.bn1, block.bn2, block.shortcut[1]):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    inner = block.bn1(block.conv1(x)).clamp(min=0)
    expected = (block.bn2(block.conv2(inner)) + block.shortcut[1](block.shortcut[0](x))).clamp(min=0)
    torch.testing.assert_close(block(x), expected)


def test_convolutions_are_he_normal_by_fan_out():
    torch.manual_seed(0)
    for name, module in create_model("resnet", 10, 56).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            expected = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06), name
            assert abs(module.weight.mean().item()) < 0.06 * expected, name
            # A normal distribution: kurtosis 3, where a uniform one of the same variance has 1.8.
            assert (module.weight / module.weight.std()).pow(4).mean().item() == pytest.approx(3, abs=0.5), name


def test_the_same_seed_gives_the_same_model():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create_model("resnet", 10, 20))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_channels_last_computes_the_same():
    torch.manual_seed(0)
    model = create_model("resnet", 10, 20)
    x = torch.randn(4, 3, 32, 32)
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient():
    model = create_model("resnet", 10, 20)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "depth", "said"),
    [
        ("resnet", 100, "the closest is 98"),
        ("resnet", 109, "the closest is 110"),
        ("resnet", 2, "the closest is 8"),
        ("resnet", -4, "the closest is 8"),
        ("resnet", None, "needs a depth"),
        ("resent", 20, "did you mean 'resnet'?"),
        ("vgg", 16, "valid: resnet"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(name, depth, said):
    with pytest.raises(ValueError) as caught:
        create_model(name, 10, depth)
    assert said in str(caught.value) and "\n" not in str(caught.value)
