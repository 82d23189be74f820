"""The record of benchmarks/gpu.sh on one page of Markdown. Needs only Python."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record

TITLES = {
    "steps": "Is the fused step right?",
    "optimizer": "How fast is a step?",
    "training": "Do the loops train, and how fast?",
    "resuming": "Does a killed run go on as if nothing had happened?",
    "whole_runs": "Whole runs of ResNet-110",
}
SHOWN = ("device", "torch", "cuda", "python", "git", "copy_gb_per_s")  # of the machine


def write_summary(record: Record, path: Path) -> None:
    values = record.values
    machine = ", ".join(f"{key} {value}" for key, value in values.get("machine", {}).items() if key in SHOWN)
    kind = "Dry run on the CPU, at toy size: its numbers say nothing" if values["dry_run"] else "Run on a GPU"
    lines = [f"# {kind}", "", f"{values['started']}, {values['minutes']:g} minutes: {machine}", ""]
    for name, part in record.parts.items():
        lines += [f"## {TITLES[name]}", "", _state(name, part), ""]
        # Of the step's many cases only those that are not fine.
        shown = {case: found for case, found in part["cases"].items() if name != "steps" or not found.get("ok", False)}
        rows = [f"- {case}: {_values(found)}" for case, found in shown.items()]
        lines += [*rows, ""] if rows else []
    path.write_text("\n".join(lines))


def _state(name: str, part: dict[str, Any]) -> str:
    checked = [found["ok"] for found in part["cases"].values() if "ok" in found]
    counts = f"; {sum(checked)} of {len(checked)} cases as they should be" if checked else ""
    why = f": {part['why']}" if "why" in part else ""
    return f"{name}: {part['status']} after {part.get('seconds', 0):.0f} s{why}{counts}"


def _values(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped, {found['skipped']}"
    shown = {key: value for key, value in found.items() if value not in ({}, [], None) and key != "parameters"}
    if shown.get("ok") is True:
        del shown["ok"]
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
