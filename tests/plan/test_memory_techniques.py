"""Each technique saves what its arithmetic says, and changes no gradient."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.plan.one_step import ARCH, Trial, saved_per_token
from xtuner import ops
from xtuner.config import MemoryConfig
from xtuner.errors import ConfigError
from xtuner.plan.tracker import MemoryTracker

TOKENS, FLOAT = 1024, 4
LAYERS, INPUT = ARCH.num_hidden_layers, TOKENS * ARCH.hidden_size * FLOAT  # bytes of a block's input
FULL = LAYERS * (TOKENS * saved_per_token(ARCH) * FLOAT - INPUT)  # saved by recomputing all
ATTENTION = LAYERS * TOKENS * (ARCH.num_attention_heads * (ARCH.head_dim + 1)) * FLOAT  # results and logsumexp
TECHNIQUES = {
    "full": ({"checkpointing": "full"}, FULL),
    "half of the blocks": ({"checkpointing": "full", "checkpointing_ratio": 0.5}, FULL / 2),
    "selective": ({"checkpointing": "selective"}, FULL - ATTENTION),
    "offload": ({"checkpointing": "full", "offload_activations": True}, FULL + (LAYERS - 1) * INPUT),
}


@pytest.fixture(scope="module")
def plain():
    return Trial(TOKENS).tracked()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_kept_for_backward(plain, name):
    fields, expected = TECHNIQUES[name]
    tracker = Trial(TOKENS, **fields).tracked()
    saved = plain.phase_peaks["kept"] - tracker.phase_peaks["kept"]
    print(f"{name}: saved {saved:,} of {plain.phase_peaks['kept']:,} bytes, by hand {expected:,.0f}")
    assert saved == pytest.approx(expected, rel=0.15)
    assert tracker.host_peak == ((LAYERS - 1) * INPUT if "offload" in name else 0)
    assert tracker.peak.device < plain.peak.device


def test_optimizer_state_on_the_host(plain):
    trial = Trial(TOKENS, offload_optimizer=True)
    tracker = trial.tracked()
    sizes = [8 * p.numel() for p in trial.model.parameters()]
    assert tracker.host_peak >= sum(sizes)
    for phase, saved in (("kept", sum(sizes)), ("between", sum(sizes)), ("update", sum(sizes) - max(sizes))):
        assert plain.phase_peaks[phase] - tracker.phase_peaks[phase] == pytest.approx(saved, rel=0.15), phase


def test_logits_in_parts():
    """torch's way keeps their logarithms, and makes both gradients of these beside them."""
    tokens, width, vocab = 2048, 32, 20_000
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width).mul_(0.1)
    labels, ones = torch.randint(vocab, (tokens,)), torch.ones(tokens)
    peaks, results = [], []
    for loss in (
        lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum"),
        lambda hidden, weight: ops.linear_cross_entropy(hidden, weight, labels, ones),
    ):
        tracker = MemoryTracker(block=1)
        hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
        with tracker:
            total = loss(hidden, weight)
            total.backward()
        peaks.append(tracker.peak.device)
        results.append((total.detach(), hidden.grad, weight.grad))
    all_logits = tokens * vocab * FLOAT
    assert peaks[0] - peaks[1] == pytest.approx(3 * all_logits, rel=0.15), [p / all_logits for p in peaks]
    assert peaks[1] < 0.25 * all_logits
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [64, 256])
def test_gradients_are_the_same_bits(tokens):
    everything = {"checkpointing": "full", "offload_activations": True, "offload_optimizer": True}
    trials = [Trial(tokens, **fields) for fields in ({}, {"checkpointing": "selective"}, everything)]
    for _ in range(2):  # the second with state already on the host
        expected, *others = [trial.step() for trial in trials]
        for gradient in others:
            assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))
    for trial in trials[1:]:
        pairs = zip(trial.model.parameters(), trials[0].model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_routing_is_decided_once():
    """Recomputation under another bias on the choice would choose other experts, did it choose at all."""
    gradients = []
    for trial in (Trial(64), Trial(64, checkpointing="full")):
        loss = trial.forward()
        for layer in trial.model.layers:
            layer.moe.gate.choice_bias = torch.arange(8.0)
        loss.backward()
        gradients.append(trial.update())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_is_kept_without_gradient():
    trial = Trial(64, checkpointing="full", offload_activations=True)
    tracker = MemoryTracker(block=1)
    with tracker, torch.no_grad():
        trial.forward()
    assert tracker.host_peak == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload_activations": True}, "moves the inputs of recomputing blocks"),
        ({"offload_optimizer": True, "offload_parameters": True}, "already keeps optimizer state on the host"),
        ({"checkpointing_ratio": 1.5}, "checkpointing_ratio=1.5"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        MemoryConfig.parse(fields)


@pytest.mark.long
@pytest.mark.parametrize("name", ["full", "selective"])
def test_resident_memory_falls_as_tracked(name):
    tokens, fields = 32 * TOKENS, TECHNIQUES[name][0]
    peaks = [_resident_growth(f, tokens) for f in ({}, fields)]
    trackers = [Trial(tokens, **f).tracked() for f in ({}, fields)]
    before, after = (max(t.phase_peaks["forward"], t.phase_peaks["backward"]) for t in trackers)
    print(f"{name}: resident {peaks[0]:,} -> {peaks[1]:,}; tracked {before:,} -> {after:,}")
    assert peaks[0] - peaks[1] == pytest.approx(before - after, rel=0.15)


def _resident_growth(fields, tokens):
    command = [sys.executable, "-m", "tests.plan.one_step", json.dumps(fields), str(tokens)]
    # Or glibc learns to keep large blocks that were freed, and the peak says nothing of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=250, env=environment)
    return int(done.stdout)
