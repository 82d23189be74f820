"""Worker processes for preparing data. They end with their parent, even if it is killed."""

import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread

from engine.errors import UserError


@contextmanager
def worker_pool(workers: int, environment: Mapping[str, str] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes with additions to their `environment`. UserError if the system kills one.

    At its end, work that has not begun is dropped.
    """
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (environment or {},)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?): run the same command again, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent deals with Ctrl-C
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
