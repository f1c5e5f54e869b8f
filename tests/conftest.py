"""Shared by all tests: two threads, so that times and memory do not depend on the machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as xtuner.run does, and as early

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(2)
