import multiprocessing

import pytest

from tests.parallel.pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Four rank processes, forked from one that has imported everything and started no thread."""
    multiprocessing.set_forkserver_preload(["tests.parallel.ep_rank", "tests.parallel.layout_rank"])
    pool = RankPool(4)
    yield pool
    pool.close()
