"""BatchNorm over groups and over passes: one large pass in groups equals small passes, of which the first counts."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from classification.batch_norm import normalise_in_groups, track_statistics
from classification.models import create_model

GROUP, GROUPS = 4, 3


def after_update(model, images, labels, passes):
    model.train()
    total = 0.0
    for index, (x, y) in enumerate(zip(images.chunk(passes), labels.chunk(passes), strict=True)):
        track_statistics(model, index == 0)
        loss = cross_entropy(model(x), y) / passes
        loss.backward()
        total += loss.detach()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": total, **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize(("name", "depth"), [("resnet", 8), ("resnet18", None)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_groups_equal_passes(name, depth, dtype):
    torch.manual_seed(0)
    model = create_model(name, 10, depth).to(dtype, memory_format=torch.channels_last)
    images = torch.randn(GROUP * GROUPS, 3, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),))
    small, large, whole = (copy.deepcopy(model) for _ in range(3))
    normalise_in_groups(large, GROUP)
    expected = after_update(small, images, labels, GROUPS)
    found = after_update(large, images, labels, 1)
    tolerance = 1e-10 if dtype == torch.float64 else 5e-3  # in float32 a value at ReLU's kink may change sides
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance * scale, msg=key)
    ungrouped = after_update(whole, images, labels, 1)
    one, other = (gradients["conv1.weight.grad"] for gradients in (ungrouped, expected))
    assert (one - other).norm() > 0.01 * other.norm()
    assert (expected["bn1.num_batches_tracked"], found["bn1.num_batches_tracked"]) == (1, 1)


def test_evaluation_and_state_are_those_of_the_model_without_groups():
    model = create_model("resnet", 10, 8)
    grouped = copy.deepcopy(model)
    normalise_in_groups(grouped, GROUP)
    grouped.load_state_dict(model.state_dict())
    images = torch.randn(7, 3, 32, 32)
    assert torch.equal(grouped.eval()(images), model.eval()(images))
    with pytest.raises(ValueError, match="7 images cannot be divided into groups of 4"):
        grouped.train()(images)
