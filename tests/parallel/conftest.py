import multiprocessing

import pytest

from tests.parallel.pool import RankPool

RANK_MODULES = [f"tests.parallel.{name}_rank" for name in ("adversary", "ep", "layout", "memory", "moe", "train")]


@pytest.fixture(scope="session")
def imports_happen_once():
    """Ranks are forked from a process that has imported everything and started no thread."""
    multiprocessing.set_forkserver_preload(RANK_MODULES)


@pytest.fixture(scope="session")
def ranks(imports_happen_once):
    """Four rank processes."""
    pool = RankPool(4)
    yield pool
    pool.close()
