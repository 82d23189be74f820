"""How fast is an optimizer step? benchmarks/optimizer_step.py on the parameters of the four models.

`share_of_copy` is the bandwidth of a step's least transfers over that of copying a large tensor. It says little about a
few MB, which stay in the L2 cache: there launches and Python count.
"""

import json
from importlib.util import find_spec

from benchmarks import optimizer_step
from benchmarks.gpu.record import Part
from benchmarks.gpu.worker import Place
from benchmarks.model_shapes import SETS

KEPT = ("median_ms", "ratio", "ratio_to_floor", "gb_per_s", "launches", "skipped")


def check(part: Part, place: Place) -> None:
    path = place.scratch / "optimizer_step.json"
    toy = ["--contenders", "Apollo fused", "--rounds", "1", "--seconds", "0"]
    full = ["--contenders", "Apollo fused,SGD fused,RAdam foreach", "--rounds", "5", "--seconds", "0.1"]
    own = ["--device", place.device.type, "--json", str(path), *(toy if place.dry else full)]
    for name in ["resnet110"] if place.dry else SETS:
        if name == "resnext50" and find_spec("torchvision") is None:
            part.add(name, skipped="torchvision, which has this model, is not here")
            continue
        if not part.has_time(name):
            continue
        optimizer_step.main(["--shapes", name, *own])
        found = json.loads(path.read_text())
        for label, result in found["sets"][name].items():
            values = {key: result[key] for key in KEPT if key in result}
            if "gb_per_s" in result:
                values["share_of_copy"] = result["gb_per_s"] / found["copy_gb_per_s"]
            part.add(f"{name}, {label}", **values)
        part.record.values["machine"]["copy_gb_per_s"] = found["copy_gb_per_s"]
