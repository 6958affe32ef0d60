"""What training.py prints: accuracies, and by class."""

from __future__ import annotations

from pathlib import Path

from common.report import format_table, percent
from training.experiment import AVERAGED, LAST


def format_results(results: dict, output_dir: Path) -> str:
    """Lay out the run's outcome for the console."""
    held_out, test = results["held_out"], results["accuracy"]

    def row(name: str, accuracy: dict) -> list[str]:
        low, high = accuracy["ci95"]
        return [
            name,
            percent(accuracy["value"]),
            f"{100 * low:.2f} – {100 * high:.2f}",
            f"{accuracy['total']:,}",
        ]

    rows = [
        row("held-out, last weights", held_out[LAST]),
        row("held-out, averaged weights", held_out[AVERAGED]),
        row(f"test, {results['chosen']} weights", test),
    ]
    table = format_table(["accuracy (FP32)", "top-1", "95 % interval", "images"], rows)
    classes = {name: entry["value"] for name, entry in results["per_class"].items()}
    worst, best = min(classes, key=classes.get), max(classes, key=classes.get)
    return (
        f"{table}\n\n"
        f"test, by class: from {percent(classes[worst], 1)} ({worst}) to "
        f"{percent(classes[best], 1)} ({best})\n"
        f"written: {output_dir / results['artifacts']['model']}\n"
    )
