"""In the place of benchmarks.gpu.worker, with four parts.

After the first one the device is useless, the second one ends the process, the third hangs, and the fourth is fine.
"""

import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.record import Part, Record

record = Record(Path(sys.argv[1]))
name, *others = sys.argv[5].split(",")
if len(others) == 3:
    Part(record, name, 60)
    record.end(name, "failed", "the device refuses everything")
    sys.exit(1)
if len(others) == 2:
    Part(record, name, 60).add("a case", ok=True)
    print("illegal memory access", flush=True)
    os._exit(3)
if len(others) == 1:
    Part(record, name, -1)
    time.sleep(600)
Part(record, name, 60).add("last", share=0.5)
record.end(name, "done")
