import pytest

from xtuner.config import ScheduleConfig
from xtuner.optim import learning_rate


def curve(steps=11, **fields):
    cfg = ScheduleConfig(**fields)
    return [learning_rate(s, steps, 1.0, cfg) for s in range(steps)]


def test_constant_after_warmup():
    assert curve(kind="constant", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8)


def test_linear_reaches_the_floor_at_the_last_step():
    lrs = curve(kind="linear", min_lr_ratio=0.1)
    assert lrs[0] == 1.0 and lrs[5] == pytest.approx(0.55) and lrs[-1] == pytest.approx(0.1)


def test_cosine_is_halfway_in_the_middle():
    lrs = curve(kind="cosine", warmup_steps=2, steps=13)
    assert lrs[2] == 1.0 and lrs[7] == pytest.approx(0.5) and lrs[-1] == pytest.approx(0.0)
    assert lrs[2:] == sorted(lrs[2:], reverse=True)


def test_wsd_is_flat_then_falls_over_decay_steps():
    lrs = curve(kind="wsd", decay_steps=4, min_lr_ratio=0.2)
    assert lrs[:7] == [1.0] * 7
    assert lrs[7:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_one_step_run():
    assert curve(steps=1, kind="cosine") == [1.0]
