"""The stages of the pipeline: each made, written, read back and measured in the same way."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from common import evaluate
from common.checkpoint import load_model, save_checkpoint
from common.data import Cifar10, batches, normalize
from common.latency import Contender, Timing, time_interleaved
from common.model import ResNet18, fold_batch_norm
from common.output import OutputFolder
from common.workers import ALONE, Workers
from pruning.allocation import global_masks, uniform_masks, weights_in_scope
from pruning.artifacts import compressed_bytes, load_packed, save_packed
from pruning.masks import prune_model
from pruning.recalibration import recalibrate_batch_norm
from quantization import artifact, conversion, deploy, packing, sparsity
from quantization.experiment import verify_reloaded
from quantization.settings import Settings

ALLOCATIONS = {"global": global_masks, "uniform": uniform_masks}
FP32_NAME, FP32_PACKED_NAME = "resnet18_cifar10_pruned.pth", "resnet18_cifar10_pruned.safetensors"
INT8_NAME = "resnet18_cifar10_pruned_int8.pth"
INT8_PACKED_NAME = "resnet18_cifar10_pruned_int8.safetensors"


@dataclass(frozen=True)
class Files:
    """A stage's model on disk, in bytes.

    Attributes:
        plain_bytes: As torch saves it; every weight takes its 4 bytes, or 1.
        compressed_bytes: The same through zlib.
        packed_bytes: A bit a weight and the values that are not zero, through LZMA.
    """

    plain_bytes: int
    compressed_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Stage:
    """One stage: what it is, its files, what it predicts, and the model to time.

    Attributes:
        name: As in results.json.
        engine: Of INT8; None in FP32.
        sparsity: Fraction of the convolution and linear weights that are zero.
        files: Their sizes.
        predictions: On the test images (int64, shape (N,)), of the model that was read back.
        deployed: The model in its fastest form.
    """

    name: str
    engine: str | None
    sparsity: float
    files: Files
    predictions: torch.Tensor
    deployed: nn.Module


def prune(dense: ResNet18, sparsity: float, allocation: str) -> ResNet18:
    """Return a copy of which a fraction ``sparsity`` of all weights is zero, smallest first."""
    pruned = copy.deepcopy(dense)
    prune_model(pruned, ALLOCATIONS[allocation](weights_in_scope(dense, "all"), sparsity))
    return pruned


def recalibrate(pruned: ResNet18, calibration: Cifar10) -> ResNet18:
    """Return a copy with batch-norm statistics re-estimated on the calibration images."""
    recalibrated = copy.deepcopy(pruned)
    recalibrate_batch_norm(recalibrated, calibration.images)
    return recalibrated


@dataclass(frozen=True)
class Bench:
    """Where every stage is measured: the same images, by the same processes.

    Attributes:
        folder: Of the files to keep; None in all processes but the first.
        test: Images to measure on.
        calibration: Images that set the ranges of INT8.
        batch_size: In images.
        workers: Each makes and reads every model itself, and evaluates a share of the images.
    """

    folder: OutputFolder | None
    test: Cifar10
    calibration: Cifar10
    batch_size: int
    workers: Workers = ALONE

    def measure_fp32(self, name: str, model: ResNet18, keep: bool = False) -> Stage:
        """Write an FP32 model, read both files back, evaluate; ``keep`` leaves them as results."""
        with self._scratch() as scratch:
            plain = self._path(FP32_NAME, scratch, keep)
            packed = self._path(FP32_PACKED_NAME, scratch, keep)
            state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
            save_checkpoint(state, plain)
            save_packed(state, packed)
            files, reloaded = _measure(plain, packed), load_model(plain)
            unpacked = load_packed(packed)
        for key, tensor in reloaded.state_dict().items():
            if not torch.equal(tensor, state[key]) or not torch.equal(tensor, unpacked[key]):
                raise AssertionError(f"{name}: {key} is not what was saved")
        best = deploy.freeze(fold_batch_norm(reloaded).to(memory_format=torch.channels_last))
        zeros = sparsity.measure_sparsity(reloaded)
        moved = reloaded.to(self.workers.device, memory_format=torch.channels_last)
        predictions = self._predict(moved, self.test.to(self.workers.device), name)
        return Stage(name, None, zeros, files, predictions, best)

    def measure_int8(
        self, name: str, model: ResNet18, settings: Settings, keep: bool = False
    ) -> Stage:
        """Quantize, write, read back, evaluate; the packed file is what the accuracy is of."""
        loader = batches(self.calibration, self.batch_size)
        converted = conversion.convert(conversion.calibrate(model, loader, settings), settings)
        counted = sparsity.count_zeros(model, converted)
        with self._scratch() as scratch:
            plain = self._path(INT8_NAME, scratch, keep)
            packed = self._path(INT8_PACKED_NAME, scratch, keep)
            artifact.save_int8(converted, settings, plain)
            packing.save_packed(converted, settings, packed)
            files, reloaded = _measure(plain, packed), artifact.load_int8(packed)
            for path in (plain, packed):
                verify_reloaded(path, reloaded, self.test)
        predictions = self._predict(reloaded, self.test, name)
        zeros = counted["zeros_after"] / counted["weights"]
        return Stage(name, settings.engine, zeros, files, predictions, reloaded)

    def time(
        self, compressed: Sequence[Stage], batch_sizes: Sequence[int], seconds: float
    ) -> dict[str, list[Timing]]:
        """Time every stage on the CPU, interleaved; ``seconds`` for each batch size."""
        contenders = [Contender(stage.name, stage.deployed) for stage in compressed]
        images = normalize(self.test.images[: max(batch_sizes)])
        return time_interleaved(contenders, images, batch_sizes, seconds)

    def _predict(self, model: nn.Module, test: Cifar10, name: str) -> torch.Tensor:
        return evaluate.predict(model, test, self.batch_size, f"evaluate {name}", self.workers)

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        """Open a folder on the disk of the results, whose free space has been checked."""
        return tempfile.TemporaryDirectory(dir=self.folder and self.folder.file("."))

    def _path(self, name: str, scratch: str, keep: bool) -> Path:
        keep = keep and self.folder is not None
        return self.folder.file(name) if keep else Path(scratch, name)


def measure_all(
    bench: Bench,
    dense: ResNet18,
    settings: Settings,
    sparsity: float,
    allocation: str,
    recalibrated: bool,
) -> list[Stage]:
    """Make and measure every stage; of FP32 and INT8, the last that is pruned is kept.

    Args:
        bench: Where.
        dense: FP32.
        settings: Of INT8.
        sparsity: Fraction of all weights to prune.
        allocation: A key of ``ALLOCATIONS``.
        recalibrated: Re-estimate batch-norm statistics after pruning, as a stage of its own.
    """
    measured = [
        bench.measure_fp32("dense", dense),
        bench.measure_int8("dense-int8", dense, settings),
    ]
    pruned = prune(dense, sparsity, allocation)
    measured.append(bench.measure_fp32("pruned", pruned, keep=not recalibrated))
    if recalibrated:
        pruned = recalibrate(pruned, bench.calibration)
        measured.append(bench.measure_fp32("pruned-recalibrated", pruned, keep=True))
    measured.append(bench.measure_int8("pruned-int8", pruned, settings, keep=True))
    return measured


def _measure(plain: Path, packed: Path) -> Files:
    return Files(plain.stat().st_size, compressed_bytes(plain), packed.stat().st_size)


def describe(
    compressed: Sequence[Stage], labels: torch.Tensor, timings: dict[str, list[Timing]]
) -> list[dict]:
    """Return results.json's ``stages``; each is compared with the first, the dense FP32 model."""
    dense = compressed[0]
    return [
        {
            "name": stage.name,
            "engine": stage.engine,
            "sparsity": stage.sparsity,
            **asdict(stage.files),
            "size_ratio": stage.files.packed_bytes / dense.files.plain_bytes,
            "accuracy": evaluate.measure_accuracy(stage.predictions == labels).as_dict(),
            "comparison": evaluate.compare(
                dense.predictions == labels, stage.predictions == labels
            ).as_dict(),
            "latency": [timing.as_dict() for timing in timings[stage.name]],
        }
        for stage in compressed
    ]
