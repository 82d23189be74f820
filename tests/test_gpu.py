"""benchmarks/gpu.sh without a GPU: its dry run, how it ends where there is no CUDA, faults, time limits, packages."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from training_runs import process

from benchmarks.gpu import main as gpu
from benchmarks.gpu import optimizer
from benchmarks.gpu.data import noise, pack_digits, packed_digits
from benchmarks.gpu.record import Part, Record
from benchmarks.gpu.resuming import KILLED_AT
from benchmarks.gpu.training import counted_waits
from benchmarks.gpu.worker import Place
from benchmarks.model_shapes import SETS
from classification.data import read_digits

ROOT = Path(__file__).parent.parent


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """`bash benchmarks/gpu.sh` with the interpreter of the tests."""
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *map(str, arguments)]
    given = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    with process(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        output, errors = running.communicate()
    return running.returncode, output, errors


@pytest.mark.timeout(3600)
def test_the_dry_run_goes_through_all_of_it(tmp_path):
    """It takes some 60 seconds of processor time. The limits are for machines that others keep busy."""
    status, output, errors = run("--dry-run", "--minutes", 50, tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    if "only 0-dimensional arrays can be converted to Python scalars" in (tmp_path / "log.txt").read_text():
        pytest.skip("the interpreter of Triton 3.2 (torch 2.6) needs numpy < 2.4")
    assert status == 0, (output, errors, (tmp_path / "log.txt").read_text()[-3000:])
    assert list(record["parts"]) == list(gpu.SHARES) and record["dry_run"] and record["machine"]["torch"]
    assert {part["status"] for part in record["parts"].values()} == {"done"}, output
    cases = {name: part["cases"] for name, part in record["parts"].items()}
    assert "no time left" not in json.dumps(cases)
    assert len(cases["steps"]) >= 14 and all(case["ok"] for case in cases["steps"].values())
    assert cases["steps"]["the same bits from a CUDA graph"]["differing"] == 0
    assert cases["optimizer"]["resnet110, Apollo fused"]["share_of_copy"] > 0
    trained = {name: case for name, case in cases["training"].items() if "loss" in case}
    assert len(trained) >= 10 and {name.split()[0] for name in trained} == {"images", "words", "sentences"}
    assert trained["images fp32 graph=true"]["loss"] == trained["images fp32 graph=false"]["loss"] > 0
    assert all(case["tensors"] > 10 and case["killed_at"] >= KILLED_AT for case in cases["resuming"].values())
    assert cases["whole_runs"]["digits"]["top1"] > 0 and cases["whole_runs"]["noise"]["of"] == 164
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "record.json", "summary.md"]
    assert output.startswith("# Dry run") and output.count("## ") == len(gpu.SHARES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_each_part_says_that_it_was_not_run(tmp_path):
    status, output, _ = run(tmp_path / "out")
    assert status == 0 and output.count("not run after 0 s: torch") == output.count("finds no CUDA device") == 5


def test_a_fault_and_a_hang_cost_one_part_each(tmp_path, monkeypatch, capsys):
    """A process gives up after a part, the next one is gone in a part, the next one hangs; what was found stays."""
    monkeypatch.setattr(gpu, "WORKER", "gpu_worker")
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    handler = gpu.signal.getsignal(gpu.signal.SIGTERM)
    status = gpu.main([str(tmp_path), "--parts", "optimizer,steps,training,resuming", "--minutes", "1"])
    gpu.signal.signal(gpu.signal.SIGTERM, handler)
    parts = json.loads((tmp_path / "record.json").read_text())["parts"]
    assert status == 1 and [part["status"] for part in parts.values()] == ["failed", "failed", "stopped", "done"]
    assert parts["optimizer"]["why"] == "the device refuses everything"
    assert "status 3: illegal memory access" in parts["steps"]["why"] and parts["steps"]["cases"]["a case"]["ok"]
    assert "last: share 0.5" in capsys.readouterr().out


def test_bad_arguments():
    status, _, errors = run("--parts", "steps,sleeping")
    assert status == 2 and "sleeping; there are steps, optimizer" in errors


def test_packages_travel_with_the_checkout(tmp_path, monkeypatch, capsys):
    """pip finds the wheels in a folder here; those that this interpreter lacks are unpacked."""
    source, packed, site = tmp_path / "source", tmp_path / "packed", tmp_path / "site"
    source.mkdir()
    for name in [*gpu.NEEDED, "apollo_unheard_of"]:
        facts = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(source / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "here = True\n")
            wheel.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{facts}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    monkeypatch.setattr(gpu, "NEEDED", [*gpu.NEEDED, "apollo_unheard_of"])
    assert gpu.main(["--pack", "3.12", "--packages", str(packed)]) == 0
    assert "MB for Python 3.12" in capsys.readouterr().out
    assert {path.name.split("-")[0] for path in packed.glob("*.whl")} == set(gpu.NEEDED)
    assert gpu.unpack(packed, site) == ["apollo_unheard_of"] and (site / "apollo_unheard_of.py").exists()
    monkeypatch.setattr(gpu, "MOST_BYTES", 1000)
    assert gpu.main(["--pack", "--packages", str(packed)]) == 1


def test_digits_in_one_file(tmp_path):
    pack_digits(tmp_path)
    ours, theirs = packed_digits(tmp_path), read_digits(tmp_path)
    assert ours.augmentation == theirs.augmentation and list(ours.classes) == list(theirs.classes)
    for split in ("train", "test"):
        for one, other in zip(getattr(ours, split), getattr(theirs, split), strict=True):
            assert torch.equal(one, other)
    assert (tmp_path / "digits.npz").stat().st_size < 2_000_000
    assert noise(20, 10).train.pixels.shape == (20, 32, 32, 3)


def test_without_torchvision_one_set_of_shapes_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    part = Part(Record(tmp_path / "record.json"), "optimizer", seconds=-1)
    optimizer.check(part, Place(torch.device("cpu"), dry=False, scratch=tmp_path, packages=tmp_path))
    skipped = {name: case["skipped"] for name, case in part.cases.items()}
    assert list(skipped) == list(SETS) and "torchvision" in skipped.pop("resnext50")
    assert set(skipped.values()) == {"no time left"}


def test_waits_are_counted_by_place(monkeypatch):
    """As torch reports them: one warning for each. Those in the log line's functions do not count."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def log_line() -> None:
        wait()

    with counted_waits(torch.device("cuda"), log_line) as waits:
        log_line()
        wait()
        warnings.warn("of another kind", stacklevel=1)
    assert modes == ["warn", "default"]
    assert len(waits) == 1 and next(iter(waits)).startswith("tests/test_gpu.py:") and set(waits.values()) == {1}
