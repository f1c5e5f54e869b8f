"""Tests that need a GPU: `pytest -m gpu`. With --device cpu, those that make sense without one."""

import random

import pytest
import torch

from xtuner import ops


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="device of the tests marked gpu: cuda, cuda:1, cpu")
    parser.addoption("--seed", type=int, default=random.randrange(1 << 30), help="of their inputs; random by default")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device", default="cuda") != "cpu":  # the default where this file is found late
        return
    kept = [item for item in items if "needs_cuda" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_report_header(config):
    return f"device tests: {config.getoption('--device')}, --seed {config.getoption('--seed')}"


@pytest.fixture(scope="session")
def device(request):
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda":
        ops.watch_faults(device)
    return device


@pytest.fixture
def rng(request):
    return torch.Generator().manual_seed(request.config.getoption("--seed"))


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """What torch allocates without initialising it holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_faults(poisoned_outputs):
    yield
    ops.raise_faults()
