"""Image classification: CIFAR-10, CIFAR-100, ImageNet, digits, and any folder of small images."""
