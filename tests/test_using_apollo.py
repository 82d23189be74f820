"""Every block of docs/using_apollo.md runs unchanged, and trains, if its libraries are installed."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import optim

PAGE = (Path(__file__).parent.parent / "docs/using_apollo.md").read_text()
BLOCKS = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
LIBRARIES = {
    "Lightning": "lightning",
    "transformers.Trainer": "transformers",
    "accelerate": "accelerate",
    "timm": "timm",
}


def test_each_section_has_its_block():
    assert list(BLOCKS) == re.findall(r"^## (.+)$", PAGE, re.MULTILINE)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("section", BLOCKS)
def test_block_runs(section, monkeypatch, tmp_path, request):
    if section in LIBRARIES:
        pytest.importorskip(LIBRARIES[section])
    if section == "FSDP2":
        request.getfixturevalue("group")
    monkeypatch.setitem(sys.modules, "apollo_optim", optim)  # its name once installed
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the default takes a minute
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    inputs = torch.randn(32, 4)
    batches = list(zip(inputs.split(8), (inputs @ torch.randn(4, 1)).split(8), strict=True))
    names = {
        "torch": torch,
        "device": "cpu",
        "model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        "loader": torch.utils.data.DataLoader(batches, batch_size=None),
        "loss_function": nn.functional.mse_loss,
        "generator": nn.Linear(4, 4),
        "discriminator": nn.Linear(4, 1),
        "output_dir": str(tmp_path),
    }
    if section == "transformers.Trainer":
        names |= language_model_and_text()
    trained = [value for value in names.values() if isinstance(value, nn.Module)]
    before = {parameter: parameter.detach().clone() for module in trained for parameter in module.parameters()}
    exec(compile(BLOCKS[section], section, "exec"), names)

    made = [value for value in names.values() if isinstance(value, optim.Apollo)]
    assert made or section in ("Lightning", "accelerate", "The optimizer in the backward pass")
    if "step()" in BLOCKS[section] or ".fit(" in BLOCKS[section] or ".train()" in BLOCKS[section]:
        used = [parameter for parameter, old in before.items() if not torch.equal(parameter.detach(), old)]
        assert used and all(parameter.isfinite().all() for parameter in used)


def language_model_and_text() -> dict[str, object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = torch.randint(16, (8, 6))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    return {"language_model": model, "token_sequences": [{"input_ids": row, "labels": row} for row in tokens]}
