"""The steps of training.py, from all images to the entries of results.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common import cli, evaluate, report
from common.checkpoint import save_checkpoint
from common.cli import UserError
from common.data import CLASSES, Cifar10, balanced_subset
from common.sources import IMAGE_SIZE
from training.augment import resize
from training.fit import EpochSummary, TrainingState, autocast, averaged_model
from training.journal import EpochRow, Journal
from training.recipe import Recipe

HELD_OUT_SEED = 0  # every run, whatever its seed, is judged on the same images
PREDICT_BATCH = 500
# Which of the two is written is decided on the held-out images; of equals, the first.
AVERAGED, LAST = "averaged", "last"


def split_held_out(images: Cifar10, count: int) -> tuple[Cifar10, Cifar10]:
    """Return the images to train on and ``count`` class-balanced ones to make choices on.

    Raises:
        UserError: That would leave none to train on.
    """
    if count >= len(images):
        raise UserError(f"{count} held-out images leave none of {len(images)} to train on")
    held = torch.zeros(len(images), dtype=torch.bool)
    held[balanced_subset(images.labels.numpy(), count, HELD_OUT_SEED)] = True
    parts = (Cifar10(images.images[part], images.labels[part]) for part in (~held, held))
    return tuple(parts)


class EpochMeter:
    """Measures an epoch's weights and their average, notes it in the journal, and saves.

    Args:
        train: For the average's batch-norm statistics.
        held_out: To measure on, at the size of the epoch's images.
        recipe: Of the run.
        seed: Of the run.
        journal: Takes the rows.
        save_every: Epochs between checkpoints; the last epoch is always saved.
    """

    def __init__(
        self,
        train: Cifar10,
        held_out: Cifar10,
        recipe: Recipe,
        seed: int,
        journal: Journal,
        save_every: int,
    ):
        self.train, self.held_out = train, held_out
        self.recipe, self.seed = recipe, seed
        self.journal, self.save_every = journal, save_every

    def __call__(self, state: TrainingState, summary: EpochSummary) -> None:
        """Take in one epoch (``after_epoch`` of :func:`training.fit.fit`)."""
        size = summary.image_size
        averaged = averaged_model(state, self.train, self.recipe, self.seed, size)
        row = EpochRow(
            **asdict(summary),
            held_out_accuracy=self._accuracy(state.model.eval(), size),
            averaged_accuracy=self._accuracy(averaged, size),
        )
        self.journal.rows.append(row)
        _announce(row, self.recipe)
        if row.epoch % self.save_every == 0 or row.epoch == self.recipe.epochs:
            self.journal.save(state)

    def _accuracy(self, model: nn.Module, size: int) -> float:
        shrunk = resize(self.held_out.images, size).permute(0, 3, 1, 2)
        images = Cifar10(shrunk, self.held_out.labels)
        with autocast(self.recipe.precision, shrunk.device):
            return evaluate.measure_accuracy(_correct(model, images)).value


def _announce(row: EpochRow, recipe: Recipe) -> None:
    size = f"  {row.image_size} px" if recipe.start_size != IMAGE_SIZE else ""
    cli.log.info(
        "epoch %*d/%d%s  loss %.3f  held-out %s  averaged %s  %.1f s",
        len(str(recipe.epochs)), row.epoch, recipe.epochs, size, row.loss,
        report.percent(row.held_out_accuracy), report.percent(row.averaged_accuracy), row.seconds,
    )  # fmt: skip


def choose(
    state: TrainingState, train: Cifar10, held_out: Cifar10, recipe: Recipe, seed: int
) -> tuple[nn.Module, dict]:
    """Choose between the last weights and their average by FP32 accuracy on held-out images.

    Returns:
        The network in eval mode, and its entry for results.json.
    """
    averaged = averaged_model(state, train, recipe, seed, count=len(train))
    candidates = {AVERAGED: averaged, LAST: state.model.eval()}
    accuracies = {
        name: evaluate.measure_accuracy(_correct(model, held_out))
        for name, model in candidates.items()
    }
    chosen = max(accuracies, key=lambda name: accuracies[name].correct)
    held_out_entries = {name: accuracy.as_dict() for name, accuracy in accuracies.items()}
    return candidates[chosen], {"chosen": chosen, "held_out": held_out_entries}


def measure_test(model: nn.Module, test: Cifar10) -> dict:
    """Return the entries of results.json that come from the test images."""
    correct, labels = _correct(model, test), test.labels.cpu()
    by_class = {
        name: evaluate.measure_accuracy(correct[labels == label]).as_dict()
        for label, name in enumerate(CLASSES)
        if (labels == label).any()
    }
    return {"accuracy": evaluate.measure_accuracy(correct).as_dict(), "per_class": by_class}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights in the course's layout: a plain FP32 state dict."""
    state = model.state_dict()
    save_checkpoint({name: value.cpu().contiguous() for name, value in state.items()}, path)


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out the run's outcome for the console."""
    held_out, test = results["held_out"], results["accuracy"]

    def row(name: str, accuracy: dict) -> list[str]:
        low, high = accuracy["ci95"]
        return [
            name,
            report.percent(accuracy["value"]),
            f"{100 * low:.2f} – {100 * high:.2f}",
            f"{accuracy['total']:,}",
        ]

    rows = [
        row("held-out, last weights", held_out[LAST]),
        row("held-out, averaged weights", held_out[AVERAGED]),
        row(f"test, {results['chosen']} weights", test),
    ]
    table = report.format_table(["accuracy (FP32)", "top-1", "95 % interval", "images"], rows)
    classes = {name: entry["value"] for name, entry in results["per_class"].items()}
    worst, best = min(classes, key=classes.get), max(classes, key=classes.get)
    return (
        f"{table}\n\n"
        f"test, by class: from {report.percent(classes[worst], 1)} ({worst}) to "
        f"{report.percent(classes[best], 1)} ({best})\n"
        f"written: {output_dir / results['artifacts']['model']}\n"
    )


def _correct(model: nn.Module, images: Cifar10) -> torch.Tensor:
    return evaluate.predict(model, images, PREDICT_BATCH) == images.labels.cpu()
