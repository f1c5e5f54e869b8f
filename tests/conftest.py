"""Shared by all tests: two threads, so that times and memory do not depend on the machine."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(2)
