"""How fast is an optimizer step? benchmarks/optimizer_step.py, the fused forms, on the parameters of the four models.

`share_of_copy` is the bandwidth that the least transfers of a step come to, over that of copying a large tensor.
Parameters of a few MB stay in the L2 cache, where it says little; there launches and Python count.
"""

import json

from benchmarks import optimizer_step
from benchmarks.gpu.record import Part
from benchmarks.gpu.worker import Place
from benchmarks.model_shapes import SETS

KEPT = ("median_ms", "ratio", "ratio_to_floor", "gb_per_s", "launches", "skipped")


def check(part: Part, place: Place) -> None:
    path = place.scratch / "optimizer_step.json"
    shapes = ["resnet110"] if place.dry else [name for name in SETS if name != "resnext50"] + ["resnext50"]
    for name in shapes:
        if not part.has_time(name):
            continue
        forms = ["--contenders", "Apollo fused,SGD fused,RAdam foreach" if not place.dry else "Apollo fused"]
        effort = ["--rounds", "1", "--seconds", "0"] if place.dry else ["--rounds", "5", "--seconds", "0.1"]
        optimizer_step.main(["--device", place.device.type, "--shapes", name, "--json", str(path), *forms, *effort])
        found = json.loads(path.read_text())
        for label, result in found["sets"][name].items():
            values = {key: result[key] for key in KEPT if key in result}
            if "gb_per_s" in result:
                values["share_of_copy"] = result["gb_per_s"] / found["copy_gb_per_s"]
            part.add(f"{name}, {label}", **values)
        part.record.values["machine"]["copy_gb_per_s"] = found["copy_gb_per_s"]
