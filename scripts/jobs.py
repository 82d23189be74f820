"""Single runs, one process each, all checked before the first one starts.

A list is a file of JSON lines, one per run. Run folders say what is done.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from engine.config import RunConfig
from engine.errors import UserError
from engine.files import write_atomically
from engine.run_record import read_result, require_same_settings
from scripts.tables import TASKS, is_same_update, load_settings

# Keys that name another run, and what to use instead.
REFUSED = {"seed": "--seeds", "run_dir": "--runs", "table": "a config of your own", "row": "a config of your own"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Job:
    task: str  # the package whose train.py trains it
    config: str
    overrides: tuple[str, ...]  # the run folder included
    folder: str
    length: PositiveInt
    unit: Literal["epoch", "update"]  # of the length

    @property
    def complete(self) -> bool:
        """Whether the run is complete now. Raises UserError if result.json is damaged."""
        result = read_result(Path(self.folder))
        return bool(result and result.get("complete"))

    @property
    def log(self) -> Path:
        """Beside the run folder."""
        return Path(f"{self.folder}.log")

    def command(self, launcher: Sequence[str] = ()) -> list[str]:
        """`launcher` holds torchrun's words, if any."""
        return [sys.executable, *launcher, "-m", f"{self.task}.train", self.config, *self.overrides]


def torchrun(gpus: int) -> list[str]:
    """Words that start `gpus` processes here. After a worker's death the job resumes."""
    if gpus == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "--max_restarts=2"]


def division(task: str, config: Path, overrides: Sequence[str], gpus: int) -> list[str]:
    """What `gpus` need on top of `overrides`: nothing, or passes that they divide; stderr says what changes.

    Raises UserError for a wrong config or override, or if no division is possible.
    """
    settings = load_settings(task, config, overrides)
    batch, passes = settings.batch, settings.passes
    if passes % gpus == 0:
        return []
    from engine.distributed import divide  # importing torch takes seconds

    found = divide(batch, passes, gpus)
    if found is None:
        raise UserError(f"--gpus {gpus}: an update of batch={batch} passes={passes} cannot be divided among so many")
    added = [f"batch={found[0]}", f"passes={found[1]}"]
    then = load_settings(task, config, (*overrides, *added))
    if is_same_update(task, settings.model_dump(), then.model_dump()):
        change = "the update is the same"
    else:
        seen = "BatchNorm sees" if task == "classification" else "a pass sees"
        change = f"{seen} {found[0]} instead of {batch}, which is another recipe than {config}"
    print(f"--gpus {gpus}: {' '.join(added)} instead of batch={batch} passes={passes}: {change}", file=sys.stderr)
    return added


def plan(table: str, config: Path, seed: int, runs: Path, overrides: Sequence[str] = ()) -> Job:
    """The run of `config` with `seed`, in its default folder below `runs`.

    Raises UserError for a wrong config, a wrong or REFUSED override, and a folder of a run with other settings.
    """
    refuse(overrides, REFUSED, "a row")
    task, overrides = TASKS[table], (f"seed={seed}", *overrides)
    settings = load_settings(task, config, overrides)
    return job_of(task, config, overrides, runs / settings.folder.relative_to("runs"), settings)


def refuse(overrides: Sequence[str], refused: Mapping[str, str], what: str) -> None:
    """Raise UserError for an override of a key in `refused`, which says what to use."""
    for key in (override.partition("=")[0] for override in overrides):
        if use := refused.get(key.partition(".")[0]):
            raise UserError(f"{key}= cannot be set for {what}, whose runs each have their own: use {use}")


def job_of(task: str, config: Path, overrides: Sequence[str], folder: Path, settings: RunConfig) -> Job:
    """`config` and `overrides` make `settings`. Raises UserError if `folder` holds another run."""
    require_same_settings(settings, folder, "another folder with --runs")
    path = str(folder) if yaml.safe_load(str(folder)) == str(folder) else json.dumps(str(folder))  # an override is YAML
    unit = "epoch" if hasattr(settings, "epochs") else "update"
    return Job(task, str(config), (*overrides, f"run_dir={path}"), str(folder), getattr(settings, f"{unit}s"), unit)


def write_list(jobs: Sequence[Job], folder: Path, name: str) -> Path:
    """Write `jobs` to `<name>-<digest>.jsonl` in `folder`; the same jobs have the same path.

    Raises UserError if two share a run folder, or writing fails.
    """
    folders = [job.folder for job in jobs]
    if twice := next((path for path in folders if folders.count(path) > 1), None):
        raise UserError(f"{twice} is the run folder of two runs: give each its own")
    text = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            raise UserError(
                f"{path}: cannot write the list of runs ({error.strerror}); choose another --runs"
            ) from None
    return path


def read_list(path: Path) -> list[Job]:
    """Raises UserError, which names the wrong line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read a list of runs ({error})") from None
    jobs = []
    for number, line in enumerate(lines, start=1):
        try:
            jobs.append(TypeAdapter(Job).validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}, line {number}: not a run: {place}: {first['msg']}") from None
    if not jobs:
        raise UserError(f"{path}: an empty list: there is nothing to run")
    return jobs
