"""Coded networks as files, measured: one of a wanted size, or the curve of size and accuracy."""

from __future__ import annotations

import gzip
import lzma
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.command.cli import log
from common.files import entropy
from common.images.data import Cifar10
from common.inputs import Inputs
from common.measure.evaluate import Paired, predict
from common.network.coded import CodedNetwork, save_coded
from common.network.resnet import fold_batch_norm
from common.report.results import format_change, format_table, megabytes, percent
from quantization.coding.encoder import encode
from quantization.coding.kernels import assemble
from quantization.files.artifact import load_int8
from quantization.settings import Settings

CODED_NAME = "resnet18_cifar10_coded.safetensors"
# Where the search for a price begins: a network of BITS; twice the bits take a quarter of it.
PRICE, BITS = 0.0235, 0.605
TOLERANCE = 0.05  # of the bits asked for; what is further off is coded again
CURVE_PRICES = (0.005, 0.01, 0.015, 0.025, 0.04, 0.07)


@dataclass(frozen=True)
class CodingBench:
    """What networks are coded and measured with.

    Attributes:
        inputs: The network; images that set the ranges of its activations, and to measure on.
        images: Training images to code on; their labels are not used.
        fp32: FP32's predictions on the images to measure on (int64, shape (N,)).
        settings: Of the INT8 model.
        batch_size: In images.
        fp32_bytes: Of the FP32 checkpoint.
    """

    inputs: Inputs
    images: Cifar10
    fp32: torch.Tensor
    settings: Settings
    batch_size: int
    fp32_bytes: int

    def code(self, price: float) -> CodedNetwork:
        """Code the network at a price of a bit, as :func:`encode` takes it."""
        folded = fold_batch_norm(self.inputs.model)
        layers = encode(folded, self.images, price, self.inputs.seed)
        return assemble(layers, self.inputs.calibration, self.settings, self.batch_size)

    def code_to(self, bits_per_weight: float) -> CodedNetwork:
        """Code the network so that a weight takes about so many bits; at most twice."""
        price = PRICE * (BITS / bits_per_weight) ** 2
        network = self.code(price)
        levels = [layer.matrix() for layer in network.layers.values()]
        excess = 8 * len(entropy.encode(levels)) / sum(x.size for x in levels) / bits_per_weight
        if abs(excess - 1) > TOLERANCE:
            network = self.code(price * excess**2)
        return network

    def measure(self, network: CodedNetwork, path: Path) -> dict:
        """Write a network, read it back, and evaluate that; return results.json's entry."""
        file_bytes, test = save_coded(network, path), self.inputs.test
        predictions = predict(load_int8(path), test, self.batch_size, "evaluate coded")
        weights = sum(layer.weight.numel() for layer in network.layers.values())
        return {
            "file_bytes": file_bytes,
            "size_ratio": self.fp32_bytes / file_bytes,
            "size_ratio_given": self.inputs.weights["size_bytes"] / file_bytes,
            "bits_per_weight": 8 * file_bytes / weights,
            **Paired.of(self.fp32 == test.labels, predictions == test.labels).as_dict(),
        }


def study_coding(bench: CodingBench, bits_per_weight: float, with_curve: bool, path: Path) -> dict:
    """Return results.json's ``coding``: a file of the wanted size, and the curve if asked for."""
    network = bench.code_to(bits_per_weight)
    point = bench.measure(network, path)
    log.info("%s: %.1f times smaller than FP32", path.name, point["size_ratio"])
    prices = CURVE_PRICES if with_curve else ()
    with tempfile.TemporaryDirectory() as folder:  # of these no file is kept
        scratch = Path(folder, CODED_NAME)
        curve = [bench.measure(bench.code(price), scratch) | {"price": price} for price in prices]
    return {
        "images": len(bench.images),
        "file": path.name,
        **point,
        "levels_bytes": compare_coders(network),
        "curve": curve,
    }


def compare_coders(network: CodedNetwork) -> dict[str, int]:
    """Return how many bytes the same levels take in other ways.

    The entropy is of each layer's levels, their order aside: what no coder without contexts beats.
    """
    layers = [layer.matrix() for layer in network.layers.values()]
    flat = np.concatenate([levels.reshape(-1) for levels in layers])
    kept = flat != 0
    return {
        "coded": len(entropy.encode(layers)),
        "entropy": round(sum(map(_entropy_bytes, layers))),
        "mask-lzma": len(lzma.compress(np.packbits(kept).tobytes()))
        + len(lzma.compress(flat[kept].tobytes())),
        "lzma": len(lzma.compress(flat.tobytes())),
        "gzip": len(gzip.compress(flat.tobytes())),
    }


def _entropy_bytes(levels: np.ndarray) -> float:
    shares = np.unique(levels, return_counts=True)[1] / levels.size
    return -levels.size * float(shares @ np.log2(shares)) / 8


def format_coding(coding: dict) -> str:
    """Lay out results.json's ``coding``."""
    others = coding["levels_bytes"].copy()
    coded = others.pop("coded")
    ratios = ", ".join(f"{name} {size / coded:.2f}×" for name, size in others.items())
    accuracy, change = percent(coding["accuracy"]["value"]), format_change(coding["comparison"])
    curve = "\n" + _format_curve(coding["curve"]) if coding["curve"] else ""
    return (
        f"the smallest file: {coding['file']}\n"
        f"  size      {megabytes(coding['file_bytes'])}, {coding['size_ratio']:.1f}× smaller than "
        f"FP32, {coding['size_ratio_given']:.1f}×\n"
        f"            than the given file; {coding['bits_per_weight']:.2f} bits a weight\n"
        f"  accuracy  {accuracy}, {change.points} points, 95 % interval {change.low} to "
        f"{change.high}\n"
        f"  its levels otherwise: {ratios}\n" + curve
    )


def _format_curve(curve: Sequence[dict]) -> str:
    header = ["coded", "size", "smaller", "accuracy", "points", "95 % interval"]
    rows = []
    for point in curve:
        change = format_change(point["comparison"])
        rows.append(
            [
                f"{point['bits_per_weight']:.2f} bits",
                megabytes(point["file_bytes"]),
                f"{point['size_ratio']:.1f}×",
                percent(point["accuracy"]["value"]),
                change.points,
                f"{change.low} to {change.high}",
            ]
        )
    return format_table(header, rows) + "\n"
