"""The record of benchmarks/gpu.sh: one JSON file, written anew after each result.

    {"machine": {...}, "parts": {"steps": {"status": "done", "seconds": 81.2, "cases": {"L2, float32": {...}}}}}

A part's status is running, done, failed, stopped (at its time limit) or not run; `why` is one line. A case that checks
something has `ok`. Needs only Python, for benchmarks/gpu/main.py.
"""

import json
import os
import time
from pathlib import Path
from typing import Any


class Record:
    """The file as last left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        return self.values["parts"]

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n")
        os.replace(temporary, self.path)

    def end(self, name: str, status: str, why: str | None = None) -> None:
        part = self.parts.setdefault(name, {"cases": {}})
        part["status"] = status
        part["seconds"] = round(time.time() - part.pop("started"), 1) if "started" in part else 0.0
        part.pop("until", None)
        if why:
            part["why"] = " ".join(why.split())[:500]
        self.write()


class Part:
    """A part at work: its cases and its time."""

    def __init__(self, record: Record, name: str, seconds: float) -> None:
        self.record, self.until = record, time.time() + seconds
        self.cases: dict[str, dict[str, Any]] = {}
        started = {"status": "running", "started": time.time(), "until": self.until, "cases": self.cases}
        record.parts[name] = started
        record.write()

    def left(self) -> float:
        return self.until - time.time()

    def add(self, case: str, **values: Any) -> None:
        """Write a result, numbers in six digits."""
        rounded = {key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in values.items()}
        self.cases[case] = rounded
        self.record.write()
        print(f"{case}: {rounded}", flush=True)

    def has_time(self, case: str, seconds: float = 0.0) -> bool:
        """Whether a case of some `seconds` has time; the record says where not."""
        if self.left() > seconds:
            return True
        self.add(case, skipped="no time left")
        return False
