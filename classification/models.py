"""The networks of the classification tables, by name.

`resnet` is the CIFAR ResNet of He et al. (2016, section 4.2): three stages of n basic blocks, 6n+2 weighted layers. If
a block changes the shape, its shortcut is a 1x1 convolution with batch norm, as in the published Apollo runs (2,752
parameters more than in the original). The others are torchvision's, untrained.
"""

from collections.abc import Callable
from functools import partial

from overrides import override
from torch import Tensor, nn

from classification.native.norm_relu import norm_relu
from engine.errors import nearest


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    @override(check_signature=False)  # torch declares no arguments
    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), self.shortcut(x))


class CifarResNet(nn.Module):
    """Float [N, 3, H, W], at least 4x4, to logits [N, num_classes]. ValueError unless `depth` is 6n+2 with n >= 1."""

    def __init__(self, num_classes: int, depth: int | None = None) -> None:
        super().__init__()
        usual = "20, 32, 44, 56, 110"
        if depth is None:
            raise ValueError(f"model 'resnet' needs a depth of the form 6n+2, such as {usual}")
        if depth < 8 or depth % 6 != 2:
            closest = max(8, round((depth - 2) / 6) * 6 + 2)
            raise ValueError(f"model 'resnet' has depth 6n+2 (such as {usual}), not {depth}; the closest is {closest}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, blocks, stride=1)
        self.stage2 = _stage(16, 32, blocks, stride=2)
        self.stage3 = _stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @override(check_signature=False)
    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu(self.bn1, self.conv1(x))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def torchvision_model(name: str, num_classes: int, depth: int | None = None) -> nn.Module:
    """torchvision's model, for float images [N, 3, H, W] of at least 32x32 pixels."""
    import torchvision  # here, as its import takes seconds

    if depth is not None:
        raise ValueError(f"model '{name}' comes in one depth: leave model.depth out")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": CifarResNet,
    **{name: partial(torchvision_model, name) for name in ("resnet18", "resnet34", "resnet50", "resnext50_32x4d")},
}


def create_model(name: str, num_classes: int, depth: int | None = None) -> nn.Module:
    """MODELS[name], initialised from torch's global generator. Raises ValueError for an unknown name or depth."""
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}'{nearest(name, MODELS)}; valid: {', '.join(MODELS)}")
    return MODELS[name](num_classes, **({} if depth is None else {"depth": depth}))
