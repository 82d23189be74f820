"""Image classification: CIFAR-10, CIFAR-100, digits, and any folder of small images."""
