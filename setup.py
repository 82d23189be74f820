"""The package and the one list of what it needs; scripts/setup.sh installs from it.

The `apex` of the package index is not NVIDIA's, so it must never stand here.
"""

REQUIREMENTS = [
    "torch>=2.6",
    "torchvision",
    "numpy",
    "pydantic>=2",
    "pyyaml",
    "overrides",
    "tqdm",
    "matplotlib",
    "scikit-learn",  # brings scipy, which reads the ids of ImageNet's development kit
    "pillow",
    "lmdb",
    "simplejpeg",
    "xxhash",
    "sacremoses",
    "sacrebleu",
    "tokenizers",
]
DEVELOPMENT = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff==0.17.*",  # another minor version may format differently
    "tensorboard",
    "ninja",
    "setuptools",
    "packaging",
    "plotly",  # the report's HTML page
    "safetensors",  # the weights that the report bundles for a release
]

if __name__ == "__main__":
    from setuptools import find_packages, setup

    folders = ["optim", "engine", "classification", "language_model", "nmt"]
    setup(
        name="apollo-experiments",
        version="0.1.0",
        description="Apollo, an adaptive parameter-wise diagonal quasi-Newton method, and all experiments of its paper",
        license="Apache-2.0",
        packages=find_packages(include=[pattern for name in folders for pattern in (name, f"{name}.*")]),
        package_data={"optim.fused": ["*.cpp"], "classification.native": ["*.cpp"]},
        python_requires=">=3.10",
        install_requires=REQUIREMENTS,
        extras_require={"dev": DEVELOPMENT},
    )
