import multiprocessing

import pytest

from tests.parallel.pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Four rank processes, forked from one that has imported everything and started no thread."""
    modules = ("ep_rank", "layout_rank", "moe_rank", "train_rank")
    multiprocessing.set_forkserver_preload([f"tests.parallel.{module}" for module in modules])
    pool = RankPool(4)
    yield pool
    pool.close()
