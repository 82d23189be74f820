"""`pip install .` installs only the optimizer, under its own name, and requires only torch."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import torch

from optim import Apollo

ROOT = Path(__file__).parent.parent
STEPS = """
import warnings
import torch, apollo_optim
warnings.simplefilter("error")  # where the fused step cannot be compiled, a warning says so
weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
optimizer = apollo_optim.Apollo([weight], lr=0.5, warmup=2, fused=True)
for _ in range(5):
    weight.grad = weight.detach().cos()
    optimizer.step()
torch.save((apollo_optim.__file__, weight.detach()), "steps.pt")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installing")
    shutil.copytree(ROOT / "optim", folder / "source/optim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / "source")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_one_name_is_installed_and_torch_is_all_it_needs(site):
    modules = [path.name for path in site.iterdir() if path.suffix != ".dist-info"]
    assert modules == ["apollo_optim"]
    (metadata,) = site.glob("*.dist-info")
    required = [text for text in Distribution.at(metadata).requires if "extra ==" not in text]
    assert len(required) == 1 and required[0].startswith("torch>=")


def test_installed_it_takes_the_fused_steps(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, weight = torch.load(tmp_path / "steps.pt", weights_only=True)
    assert Path(file) == site / "apollo_optim/__init__.py"

    expected = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    optimizer = Apollo([expected], lr=0.5, warmup=2, fused=False, foreach=False)
    for _ in range(5):
        expected.grad = expected.detach().cos()
        optimizer.step()
    torch.testing.assert_close(weight, expected.detach())
