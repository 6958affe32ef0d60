"""Runtimes with models of the same weights, calibration images and number of threads."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import ENGINE_PREFIX
from common.command.cli import log
from common.images.data import ImageSet
from common.network.execution import Network
from quantization.files.int8_file import save_int8
from quantization.int8 import engines
from quantization.int8.conversion import convert
from quantization.int8.engines.onnx_engines import export_onnx, load_onnx, load_openvino
from quantization.int8.network import Int8Network
from quantization.steps import CalibrationSetup

ONNXRUNTIME_FILE = "onnxruntime_int8.onnx"
CALIBRATION_BATCH = 64

Run = Callable[[torch.Tensor], torch.Tensor]  # from normalised images (N, C, H, W) to logits


@dataclass(frozen=True)
class Runtime:
    """A model in a runtime."""

    run: Run
    size_bytes: int  # size of the file
    memory_format: torch.memory_format = torch.channels_last  # layout of its images


def has_packages(names: tuple[str, ...], row: str) -> bool:
    """Return whether packages are installed; if not, log which row is left out."""
    missing = " ".join(name for name in names if not importlib.util.find_spec(name))
    if missing:
        log.warning("left out %s: pip install %s", row, missing)
    return not missing


def make_rows(network: Network, setup: CalibrationSetup, folder: Path) -> dict[str, Runtime]:
    """Return runtimes by name; those whose packages are missing are left out, named in the log."""
    calibration = setup.calibration
    rows = {"torch-fp32": torch_fp32(network)}
    if has_packages(("onnx", "onnxruntime"), "ONNX Runtime"):
        rows["onnxruntime-fp32"] = onnxruntime_fp32(network, folder)
        rows["onnxruntime-int8"] = onnxruntime_own(network, calibration, folder)
    if has_packages(("onnx", "openvino", "nncf"), "NNCF + OpenVINO"):
        rows["openvino-int8"] = openvino_own(network, calibration, folder)
    settings = [engines.choose_settings(engine) for engine in engines.candidate_engines()]
    observation = setup.observe(network, settings[0])
    for one in settings:
        rows[f"{ENGINE_PREFIX}{one.engine}"] = ours(one.engine, convert(observation, one), folder)
    return rows


def torch_fp32(network: Network) -> Runtime:
    """FP32 on torch's fastest path."""
    size_bytes = sum(x.weight.nbytes + x.bias.nbytes for x in network.layers.values())
    return Runtime(engines.fp32_runner(network), size_bytes)


def ours(engine: str, network: Int8Network, folder: Path) -> Runtime:
    """The INT8 network on one of the engines."""
    size_bytes = save_int8(network, folder / f"{engine}.safetensors")
    is_nchw = engine in ("onnxruntime", "openvino")
    layout = torch.contiguous_format if is_nchw else torch.channels_last
    return Runtime(engines.runner(engine, network), size_bytes, layout)


def onnxruntime_fp32(network: Network, folder: Path) -> Runtime:
    """FP32 in ONNX Runtime."""
    path = folder / "onnxruntime_fp32.onnx"
    export_onnx(network, path)
    return _onnx_file(path)


def onnxruntime_own(network: Network, calibration: ImageSet, folder: Path) -> Runtime:
    """INT8 by ONNX Runtime's own static quantizer: Q/DQ, u8s8, one weight scale a channel."""
    from onnxruntime import quantization as ort

    batches = calibration.batches(CALIBRATION_BATCH)
    inputs = ({"images": images.contiguous().numpy()} for images, _ in batches)

    class Reader(ort.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(inputs, None)

    fp32, path = folder / "fp32.onnx", folder / ONNXRUNTIME_FILE
    export_onnx(network, fp32)
    with _quiet_logging():
        ort.quantize_static(
            fp32, path, Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
            activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
        )  # fmt: skip
    return _onnx_file(path)


def openvino_own(network: Network, calibration: ImageSet, folder: Path) -> Runtime:
    """INT8 by NNCF's post-training quantization, run in OpenVINO."""
    with _quiet_logging():
        import nncf
        import openvino

        fp32, path = folder / "fp32_nncf.onnx", folder / "openvino_int8.xml"
        export_onnx(network, fp32)
        images = calibration.normalize(calibration.images).contiguous().numpy()
        dataset = nncf.Dataset([image[None] for image in images])
        model = openvino.Core().read_model(fp32)
        quantized = nncf.quantize(model, dataset, subset_size=len(images))
        openvino.save_model(quantized, path, compress_to_fp16=False)
    size_bytes = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    run = load_openvino(quantized, calibration.shape)
    return Runtime(run, size_bytes, torch.contiguous_format)


def _onnx_file(path: Path) -> Runtime:
    return Runtime(load_onnx(path), path.stat().st_size, torch.contiguous_format)


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keep the quantizers' notes and progress bars away from the benchmark's own."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
