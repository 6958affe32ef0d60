"""The plot of a training run: loss, accuracies and learning rate by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.report import BLUE, GREEN, GREY, ORANGE, RED, new_figure, save_figure
from training.journal import EpochRow


def plot_curves(path: Path, rows: Sequence[EpochRow]) -> None:
    """Draw the run's epochs as PNG."""
    figure, (loss_axes, accuracy_axes, rate_axes) = new_figure(11, 3.6, columns=3)
    epochs = [row.epoch for row in rows]
    marker = "o" if len(rows) < 2 else None  # a line through one point shows nothing
    loss_axes.plot(epochs, [row.loss for row in rows], color=BLUE, marker=marker)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")

    for values, label, colour in (
        ([row.train_accuracy for row in rows], "training images, augmented", GREY),
        ([row.held_out_accuracy for row in rows], "held-out images", ORANGE),
        ([row.averaged_accuracy for row in rows], "held-out, averaged weights", GREEN),
    ):
        percents = [100 * value for value in values]
        accuracy_axes.plot(epochs, percents, label=label, color=colour, marker=marker)
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="top-1 (%)")
    accuracy_axes.legend(loc="lower right", fontsize=8)

    rates = [row.learning_rate for row in rows]
    rate_axes.plot(epochs, rates, color=RED, marker=marker)
    rate_axes.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    sizes = [row.image_size for row in rows]
    if len(set(sizes)) > 1:
        size_axes = rate_axes.twinx()
        size_axes.step(epochs, sizes, color=GREY, where="mid", linestyle=":")
        size_axes.set(ylabel="image size (pixels, dotted)", ylim=(0, 34))
        size_axes.grid(False)
    save_figure(figure, path)
