"""Worker processes: their environment, and what is said when the system kills one."""

import os

import pytest

from engine.errors import UserError
from engine.workers import worker_pool


def test_a_worker_gets_its_environment_and_a_killed_one_is_reported():
    killed = pytest.raises(UserError, match="a worker process was killed .*fewer --workers")
    with killed, worker_pool(1, {"ONE_MORE": "yes"}) as pool:
        assert pool.submit(os.getenv, "ONE_MORE").result() == "yes"
        pool.submit(os._exit, 1).result()
