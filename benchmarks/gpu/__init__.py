"""What `bash benchmarks/gpu.sh` runs: five parts, each for one question.

main.py       options, packages, and the time limit of each part      record.py     what is written, when
worker.py     the process that runs the parts, one after the other    summary.py    the record on one page
steps.py  optimizer.py  training.py  resuming.py  whole_runs.py       the parts, in order of worth
"""
