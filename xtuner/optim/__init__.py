"""Optimizers, learning-rate schedules and the balancing of experts."""

from xtuner.optim.adamw import build_adamw
from xtuner.optim.balance import update_choice_bias
from xtuner.optim.clip import clip_grad_norm
from xtuner.optim.host_state import keep_state_on_host
from xtuner.optim.schedule import learning_rate

__all__ = ["build_adamw", "clip_grad_norm", "keep_state_on_host", "learning_rate", "update_choice_bias"]
