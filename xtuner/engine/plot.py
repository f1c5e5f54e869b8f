"""The loss curve and the load of the experts as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from xtuner.engine.metrics import read_metrics


def plot_loss(metrics_path: Path, png_path: Path, reference_losses: dict[str, float]) -> None:
    """Draw training loss (raw and smoothed), validation loss and named horizontal reference lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(metrics_path)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    validation = [(r["step"], r["loss"]) for r in records if r["kind"] == "validation"]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color="tab:blue", label=f"training, now {_smooth(losses)[-1]:.3f}")
    if validation:
        label = f"held-out, now {validation[-1][1]:.3f}"
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label=label)
    for name, value in reference_losses.items():
        axes.axhline(value, color="grey", linestyle="--", linewidth=1, label=f"{name} {value:.3f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or validation or reference_losses:
        axes.legend()
    figure.tight_layout()
    figure.savefig(png_path)
    plt.close(figure)


def plot_expert_load(counts_LE: Tensor, layers: Sequence[int], png_path: Path) -> None:
    """Heat map, layers x experts: choices that went to each expert over the mean of its layer (1: balanced).

    Args:
        layers: the number of each row's layer in the model.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    load_LE = counts_LE / counts_LE.mean(1, keepdim=True).clamp_min(1e-9)
    busiest = load_LE.max().item()
    height = min(12.0, 1.8 + 0.22 * len(layers))
    figure, axes = plt.subplots(figsize=(8, height), dpi=120)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, busiest))
    image = axes.imshow(load_LE.numpy(), aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    figure.colorbar(image, label="choices over the layer's mean")
    shown = range(0, len(layers), 1 + len(layers) // 24)
    axes.set_yticks(list(shown), [str(layers[i]) for i in shown])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"expert load: busiest {busiest:.2f} x mean, {int((counts_LE == 0).sum())} never chosen")
    figure.tight_layout()
    figure.savefig(png_path)
    plt.close(figure)


def _smooth(values: tuple[float, ...], momentum: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = momentum * average + (1 - momentum) * value
        weight = momentum * weight + (1 - momentum)
        smoothed.append(average / weight)
    return smoothed
