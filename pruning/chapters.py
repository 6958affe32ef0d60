"""The chapters of pruning.py's account: each adds to results.json and writes its files."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.checkpoint import load_model
from common.data import Cifar10
from common.inputs import Inputs
from common.output import OutputFolder
from common.size import Layer, describe_layers
from common.workers import Workers
from pruning import (
    artifacts,
    experiment,
    finetuning,
    model_results,
    plots,
    savings,
    search,
    tables,
)
from pruning.model_search import ModelSearch
from pruning.recalibration import RECALIBRATION_IMAGES
from pruning.scan import ScanResult

SENSITIVITY_CSV, CURVE_CSV = "sensitivity.csv", "linear_curve.csv"


@dataclass(frozen=True)
class Account:
    """What a run has to tell, and of what.

    Attributes:
        results: Of results.json; every chapter adds to it.
        folder: Of the files.
        inputs: The dense network and the images, on one device.
        scanned: What the scan found.
    """

    results: dict
    folder: OutputFolder
    inputs: Inputs
    scanned: ScanResult

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """The network's convolutions and linear layers."""
        return describe_layers(self.inputs.model)


@dataclass(frozen=True)
class Training:
    """What the search over many layers needs beside the test images.

    Attributes:
        recalibration: uint8 images (N, 3, 32, 32) for batch-norm statistics; None: none are
            re-estimated.
        finetuning: To train on; None: nothing is trained.
        epochs: Of that training.
    """

    recalibration: torch.Tensor | None
    finetuning: Cifar10 | None
    epochs: int | None

    @classmethod
    def read(
        cls, inputs: Inputs, recalibrated: bool, epochs: int | None, count: int | None
    ) -> Training:
        """Read it to the device of ``inputs``; ``count`` images to train on, None for all.

        Raises:
            UserError: There are too few: better found before the scan than after it.
        """
        device = inputs.test.images.device
        recalibration = finetuning = None
        if recalibrated:
            recalibration = inputs.load_training(RECALIBRATION_IMAGES).images.to(device)
        if epochs:
            finetuning = inputs.load_training(count).to(device)
        return cls(recalibration, finetuning, epochs)


def add_scan(account: Account, amounts: Sequence[float], verification: dict | None) -> None:
    """Describe the structure, and what each layer alone costs; say what brute force found."""
    account.results.update(
        experiment.scan_results(account.scanned, account.inputs.model, account.layers, amounts)
    )
    if verification is not None:
        account.results["verification"] = verification


def add_linear_search(
    account: Account, tolerance: float, holdout_seed: int | None, batch_size: int, workers: Workers
) -> None:
    """Search how far the linear layer can go, write that model, and confirm what was written."""
    results, inputs, scanned = account.results, account.inputs, account.scanned
    linear, pruned_weights = search.search_linear(
        inputs.model, scanned.features, inputs.test.labels.cpu(), tolerance, holdout_seed
    )
    plain = account.folder.file(artifacts.PRUNED_NAME)
    sizes = savings.save_artifacts(
        inputs.model,
        savings.prune_linear(inputs.model, pruned_weights),
        plain,
        account.folder.file(artifacts.PACKED_NAME),
    )
    linear["confirmed"] = savings.confirm(
        load_model(plain),
        inputs.test,
        scanned.features,
        scanned.dense_correct,
        batch_size,
        workers,
    )
    results["linear_search"] = linear
    results["savings"] = savings.measure_savings(
        sizes, results["structure"], inputs.model, inputs.test
    )


def add_model_search(
    account: Account,
    searched: ModelSearch,
    allocations: Sequence[str],
    training: Training,
) -> None:
    """Search how far many layers can go together; the saved model is then the sparsest found."""
    started = time.perf_counter()
    results = account.results
    searched.training = training.recalibration
    found = model_results.run_all(searched, allocations, account.layers)
    if training.epochs:
        best = model_results.best_of(found)
        found.append(
            finetuning.run_finetuned(
                searched, best, training.finetuning, training.epochs, account.layers
            )
        )
    results["model_search"] = [one.entry for one in found]
    results["model_search_seconds"] = time.perf_counter() - started
    results["model_saved"] = model_results.save_best(
        searched,
        found,
        account.folder.file(artifacts.PRUNED_NAME),
        account.folder.file(artifacts.PACKED_NAME),
    )


def add_files(account: Account) -> None:
    """Write the CSV files, draw the plots, and name every file that was written."""
    results, file = account.results, account.folder.file
    tables.write_sensitivity_csv(results["sensitivity"], file(SENSITIVITY_CSV))
    tables.write_curve_csv(results["linear_search"]["curve"], file(CURVE_CSV))
    results["artifacts"] = {
        "model": artifacts.PRUNED_NAME,
        "packed": artifacts.PACKED_NAME,
        "csv": [SENSITIVITY_CSV, CURVE_CSV],
        "plots": plots.draw_all(results, file),
    }
