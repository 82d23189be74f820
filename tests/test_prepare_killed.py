"""Every preparation of text, killed at random moments and started again, ends in the same bytes.

PREPARE_KILLS is the number of kills, 3 by default. The long form is

    PREPARE_KILLS=10 python -m pytest tests/test_prepare_killed.py
"""

import os
import random
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from lm_corpus import make_corpus
from wmt14_layouts import orig, statmt_archives, toy_texts

from language_model import raw_text as lm_text
from language_model.prepare import build
from nmt.prepare import raw_text as nmt_text
from nmt.prepare import sources, stages
from nmt.prepare.command import prepare
from nmt.prepare.recipes import WMT14

KILLS = int(os.environ.get("PREPARE_KILLS", "3"))


def language_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """From a folder, in many small shards, with a vocabulary counted from the text."""
    monkeypatch.setattr(lm_text, "PART_BYTES", 9_000)
    return partial(build, make_corpus(folder / "text"))


def language_model_archive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    monkeypatch.setattr(lm_text, "PART_BYTES", 9_000)
    with tarfile.open(folder / "benchmark.tar.gz", "w:gz") as tar:
        tar.add(make_corpus(folder / "text"), "benchmark")
    return partial(build, folder / "benchmark.tar.gz", tests=["all"])


def translation(layout: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """In small chunks. SGM and archives are unpacked first."""
    for module in (nmt_text, stages):
        monkeypatch.setattr(module, "CHUNK", 32)
    for name, content in layout(toy_texts(100)).items():
        (folder / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "text" / name).write_bytes(content)
        if name in sources.CHECKSUMS:
            monkeypatch.setitem(sources.CHECKSUMS, name, None)
    return partial(prepare, replace(WMT14, lines={}, merges=200), folder / "text")


def in_a_process(make: Callable[[Path], None], out: Path, seconds: float | None) -> tuple[int, float]:
    """Make `out` in a process that kills itself after `seconds`. Returns its exit status and lifetime in seconds."""
    start = time.monotonic()
    if not (child := os.fork()):
        if seconds is not None:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            make(out)
        finally:
            os._exit(0 if (out / "manifest.json").exists() else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - start


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize(
    "prepared",
    [language_model, language_model_archive, partial(translation, orig), partial(translation, statmt_archives)],
    ids=["language model", "language model, archive", "translation, orig", "translation, archives"],
)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(prepared, tmp_path, monkeypatch):
    make = prepared(tmp_path, monkeypatch)
    status, duration = in_a_process(make, tmp_path / "whole", None)
    assert status == 0
    moments, killed = random.Random(2009), 0
    for number in range(KILLS):
        out = tmp_path / f"killed{number}"
        for moment in sorted(moments.uniform(0, duration) for _ in range(2)):
            status, _ = in_a_process(make, out, moment)
            assert status in (0, -signal.SIGKILL)
            killed += status == -signal.SIGKILL
        assert in_a_process(make, out, None)[0] == 0
        assert files_of(out) == files_of(tmp_path / "whole"), f"other files after kills of number {number}"
    assert killed  # nearly all of them; a second start has less to do
