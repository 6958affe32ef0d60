"""Looking closer at two models' answers: is FP32 sane, which classes suffer, which images flip."""

from __future__ import annotations

from pathlib import Path

import torch

from common import cli, report
from common.cifar10 import CLASSES
from common.data import Cifar10, normalize
from common.model import ResNet18

SANITY_IMAGES, SANITY_BATCH = 500, 50
CHANCE_MARGIN = 0.1  # accuracy this close above chance is no training worth the name
OVERCONFIDENCE = 0.25  # a trained network on its own kind of images stays far below this
SHEET_COLUMNS, SHEET_ROWS = 8, 4


@torch.inference_mode()
def warn_of_insane_fp32(model: ResNet18, test: Cifar10, predictions: torch.Tensor) -> None:
    """Warn where FP32 accuracy is near chance, or far below what the model's confidence claims.

    Args:
        model: FP32, in eval mode, on the CPU.
        test: The images that were evaluated, on the CPU.
        predictions: int64, shape (N,).
    """
    accuracy = float((predictions == test.labels).float().mean())
    batches = test.images[:SANITY_IMAGES].split(SANITY_BATCH)  # all at once would take 0.8 GB
    logits = torch.cat([model(normalize(images)) for images in batches])
    confidence = float(logits.softmax(dim=1).amax(dim=1).mean())
    causes = (
        "likely causes: images normalised otherwise than in training, classes in another order, or "
        "a checkpoint of another data set or layout"
    )
    if accuracy < 1 / len(CLASSES) + CHANCE_MARGIN:
        cli.log.warning("FP32 accuracy is %.1f %%, near chance; %s", 100 * accuracy, causes)
    elif confidence - accuracy > OVERCONFIDENCE:
        cli.log.warning(
            "FP32 accuracy is %.1f %%, though the model is %.0f %% sure of its answers; %s",
            100 * accuracy, 100 * confidence, causes,
        )  # fmt: skip


def accuracy_by_class(
    labels: torch.Tensor, fp32: torch.Tensor, int8: torch.Tensor
) -> list[dict[str, object]]:
    """Return each class's accuracy before and after, from predictions (int64, shape (N,))."""
    rows = []
    for index, name in enumerate(CLASSES):
        of_class = labels == index
        if not of_class.any():
            continue
        before, after = ((p[of_class] == index).float().mean().item() for p in (fp32, int8))
        rows.append({"class": name, "images": int(of_class.sum()), "fp32": before, "int8": after})
    return rows


def plot_flips(dataset: Cifar10, fp32: torch.Tensor, int8: torch.Tensor, path: Path) -> int:
    """Draw a contact sheet of images that the two models answer differently; return their number.

    Losses come first, then gains, then images that both get wrong in different ways. Where no
    answer changes there is nothing to see, and no file is written.
    """
    flipped = (fp32 != int8).nonzero().flatten().tolist()
    if not flipped:
        return 0
    labels = dataset.labels.tolist()

    def kind(index: int) -> int:
        return 0 if fp32[index] == labels[index] else 1 if int8[index] == labels[index] else 2

    shown = sorted(flipped, key=kind)[: SHEET_COLUMNS * SHEET_ROWS]
    rows = -(-len(shown) // SHEET_COLUMNS)
    figure, axes = report.new_figure(11, 1.75 * rows + 0.5, rows, SHEET_COLUMNS, squeeze=False)
    losses, gains = (sum(kind(i) == k for i in flipped) for k in (0, 1))
    figure.suptitle(
        f"{len(flipped)} of {len(dataset):,} answers change: {losses} lost, {gains} gained, "
        f"{len(flipped) - losses - gains} wrong either way"
        + (f" (the first {len(shown)})" if len(shown) < len(flipped) else ""),
        fontsize=11, fontweight="bold",
    )  # fmt: skip
    colors = (report.RED, report.GREEN, report.GREY)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, shown, strict=False):
        axis.imshow(dataset.images[index].permute(1, 2, 0).numpy(), interpolation="bicubic")
        axis.set_title(
            f"true: {CLASSES[labels[index]]}\nFP32: {CLASSES[fp32[index]]}\n"
            f"INT8: {CLASSES[int8[index]]}",
            fontsize=7.5, fontweight="normal", color=colors[kind(index)],
        )  # fmt: skip
    report.save_figure(figure, path)
    return len(flipped)
