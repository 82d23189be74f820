"""What `pip install .` brings, and the one list of what the repository needs; scripts/setup.sh installs from it.

Only the optimizer is installed, as `apollo_optim`: a top-level `optim` would hide users' own folders of that name. The
`apex` of the package index is not NVIDIA's and must never stand here.
"""

OPTIMIZER = ["torch>=2.6"]
EXPERIMENTS = [
    "torchvision",
    "numpy",
    "pydantic>=2",
    "pyyaml",
    "overrides",
    "tqdm",
    "matplotlib",
    "scikit-learn",  # brings scipy, which reads ImageNet's development kit
    "pillow",
    "lmdb",
    "simplejpeg",
    "safetensors",  # the weights of a bundle
    "xxhash",
    "sacremoses",
    "sacrebleu",
    "tokenizers",
]
OTHERS = [  # optimizers to compare with
    "pytorch_optimizer>=4",
    "schedulefree",
]
DEVELOPMENT = [
    *OTHERS,
    "pytest",
    "pytest-timeout",
    "pytest-xdist>=3.2",  # --dist worksteal
    "hypothesis",
    "pyarrow",  # for one form of ImageNet
    "ruff==0.17.*",  # another minor version may format differently
    "tensorboard",
    "submitit",  # scripts/reproduce.sh --executor slurm
    "ninja",
    "setuptools>=70.1",  # builds without the package `wheel`
    "packaging",
    "plotly",  # the report's page
]

if __name__ == "__main__":
    from setuptools import find_packages, setup

    setup(
        name="apollo-optim",
        version="0.1.0",
        description="Apollo, an adaptive parameter-wise diagonal quasi-Newton method (arXiv 2009.13586), for PyTorch",
        license="Apache-2.0",
        packages=[f"apollo_{name}" for name in find_packages(include=["optim", "optim.*"])],
        package_dir={"apollo_optim": "optim"},
        package_data={"apollo_optim": ["*.h"], "apollo_optim.fused": ["*.cpp", "*.h"]},
        python_requires=">=3.10",
        install_requires=OPTIMIZER,
        extras_require={"experiments": EXPERIMENTS, "slurm": ["submitit"], "optimizers": OTHERS, "dev": DEVELOPMENT},
    )
