"""A picture of memory over a step."""

from __future__ import annotations

from pathlib import Path

from xtuner.plan.tracker import MemoryTracker


def plot_timeline(tracker: MemoryTracker, capacity_gib: float, path: Path) -> None:
    """Device memory at every allocation of the last step, phases shaded, the device's capacity as a line."""
    from matplotlib.figure import Figure

    phases = [phase for phase, _ in tracker.timeline]
    # The last step begins where "forward" is entered last.
    start = max(i for i in range(len(phases)) if phases[i] == "forward" and (i == 0 or phases[i - 1] != "forward"))
    gib = [size / 2**30 for _, size in tracker.timeline[start:]]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(range(len(gib)), gib, step="post", alpha=0.35)
    axes.plot(gib, drawstyle="steps-post", linewidth=0.8)
    axes.axhline(capacity_gib, color="tab:red", linestyle="--", label=f"device, {capacity_gib} GiB")
    for i in range(start, len(phases)):
        if i == start or phases[i] != phases[i - 1]:
            axes.axvline(i - start, color="grey", linewidth=0.5)
            if i + len(gib) // 20 < len(phases):  # wide enough for its name
                axes.text(i - start, capacity_gib * 0.98, f" {phases[i]}", va="top", fontsize=8)
    axes.set(xlabel="allocations", ylabel="GiB", ylim=(0, capacity_gib * 1.08), title="Device memory over one step")
    axes.legend(loc="upper right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
