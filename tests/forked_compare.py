"""scripts/compare.py as tests run it: its runs are forked from this process, which has imported torch once.

A run of these tests takes less time than the import. The processes have a session, a log and an exit status of their
own, and can be killed.
"""

import os
import sys
from importlib import import_module

import scripts.compare
import scripts.pool
from engine.errors import run_main


class Forked:
    """What scripts.pool uses of a Popen."""

    def __init__(self, command, log, environment):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            scripts.pool._end_with_parent()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ.update(environment or {})
            sys.argv[1:] = command[3:]
            try:
                run_main(import_module(command[2]).main)
            except SystemExit as ended:
                sys.stderr.flush()
                os._exit(ended.code or 0)
            finally:
                os._exit(1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(15)


if __name__ == "__main__":
    scripts.pool.start = Forked
    for name in ("classification.train", "sklearn.datasets"):
        import_module(name)
    run_main(scripts.compare.main)
