"""How each runtime comes to its INT8 model of the same weights, from the same calibration images.

Every function returns a :class:`Runner`: what maps normalised images to logits at a given number of
threads, and how many bytes the model takes on disk.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from quantization.int8.deploy import Quantized
from torch import nn

from common.command.cli import log
from common.images.cifar10 import IMAGE_SIZE
from common.images.data import ImageSet, batches, normalize
from common.measure.latency import Contender, time_interleaved
from common.network.resnet import ResNet18, fold_batch_norm
from common.network.size import saved_size_bytes
from quantization.files import artifact, onnx_export
from quantization.int8 import deploy, engines

CALIBRATION_BATCH = 64
GEMM_SIZES = (512, 1024, 2048)
GEMM_SECONDS = 1.0

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Runner:
    """A model in a runtime.

    Attributes:
        run: Maps normalised float32 images (N, 3, 32, 32) to logits (N, 10).
        size_bytes: On disk.
        memory_format: Layout of the images that it is fed.
    """

    run: Run
    size_bytes: int
    memory_format: torch.memory_format = torch.channels_last


def has_package(name: str, rows: str) -> bool:
    """Return whether a package is installed; says in one line which rows are left out if not."""
    if importlib.util.find_spec(name):
        return True
    log.warning("no %s: left out %s; pip install %s", name, rows, name)
    return False


def has_compiler(row: str) -> bool:
    """Return whether there is a C++ compiler, for inductor; says what is left out if not."""
    if any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return True
    log.warning("no C++ compiler: left out %s", row)
    return False


def for_each_batch_size(prepare: Callable[[int], Run]) -> Run:
    """Return what runs images by a program for just their number, made at the first such call."""
    prepared = functools.cache(prepare)
    return lambda images: prepared(len(images))(images)


# --- torch ---------------------------------------------------------------------------------------


def torch_fp32(model: ResNet18) -> Runner:
    """FP32 at its best."""
    return Runner(deploy.deploy_fp32(model), saved_size_bytes(model.state_dict()))


def torch_bf16(model: ResNet18) -> Runner:
    """Bfloat16, channels_last, compiled, which needs a C++ compiler."""
    torch._dynamo.config.recompile_limit = 32  # one compilation a batch size
    folded = fold_batch_norm(model).to(torch.bfloat16, memory_format=torch.channels_last)
    compiled = torch.compile(folded, dynamic=False, options={"freezing": True})

    def run(images: torch.Tensor) -> torch.Tensor:
        return compiled(images.to(torch.bfloat16)).float()

    return Runner(run, saved_size_bytes(folded.state_dict()))


def torch_pt2e(model: ResNet18, calibration: ImageSet, folder: Path) -> Runner:
    """INT8 by torchao's x86 quantizer (PT2E, the named successor of ``torch.ao``), compiled.

    Its graph runs fast only when inductor compiles it, which needs a C++ compiler, and what
    AOTInductor saves is for one batch size: so there is one package for each, as our own deployed
    model is prepared for each.
    """

    @functools.cache
    def package(batch_size: int) -> Path:
        path = folder / f"pt2e_{batch_size}.pt2"
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "To copy construct from a tensor")  # its own
            program = torch.export.export(converted, (deploy.blank_images(batch_size),))
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"freezing": True}
            )
        return path

    with _quiet_logging():
        converted = _quantize_pt2e(model, calibration)
        size_bytes = package(1).stat().st_size
    load = torch._inductor.aoti_load_package
    return Runner(for_each_batch_size(lambda count: load(str(package(count)))), size_bytes)


def _quantize_pt2e(model: ResNet18, calibration: ImageSet) -> nn.Module:
    """Return the INT8 graph of torchao's x86 quantizer with its default settings."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.inference_mode(False), torch.no_grad():
        any_batch = {0: torch.export.Dim("N", max=1024)}
        example = (deploy.blank_images(2),)
        program = torch.export.export(model, example, dynamic_shapes=(any_batch,))
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program.module(), quantizer)
        for images, _ in batches(calibration, CALIBRATION_BATCH):
            prepared(images)
        return convert_pt2e(prepared)


def torch_plain(quantized: Quantized, folder: Path) -> Runner:
    """The INT8 model as ``convert_fx`` leaves it."""
    path = folder / f"{quantized.settings.engine}.pth"
    size_bytes = artifact.save_int8(quantized.model, quantized.settings, path)
    return Runner(quantized.model, size_bytes)


def torch_deployed(quantized: Quantized, folder: Path) -> Runner:
    """The INT8 model in its fastest form: flat, fused where the engine can, frozen."""
    engine = quantized.settings.engine
    if not deploy.CAN_FREEZE:
        return Runner(quantized.deployed, torch_plain(quantized, folder).size_bytes)
    path = folder / f"{engine}{artifact.FROZEN_SUFFIX}"
    return Runner(quantized.deployed, artifact.save_frozen(quantized.model, engine, path))


# --- ONNX Runtime and OpenVINO -------------------------------------------------------------------


def _openvino_runner(model: object, size_bytes: int) -> Runner:
    import openvino

    core, settings = (
        openvino.Core(),
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )

    def prepare(batch_size: int) -> Run:
        fixed = model.clone()  # a fixed shape is what OpenVINO optimises best
        fixed.reshape([batch_size, 3, IMAGE_SIZE, IMAGE_SIZE])
        request = core.compile_model(fixed, "CPU", settings).create_infer_request()

        def run(images: torch.Tensor) -> torch.Tensor:
            outputs = request.infer([images.contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(outputs[0].copy())

        return run

    return Runner(for_each_batch_size(prepare), size_bytes, torch.contiguous_format)


def onnxruntime_fp32(model: ResNet18, folder: Path) -> Runner:
    """FP32 in ONNX Runtime."""
    path = folder / "fp32.onnx"
    _export_fp32(model, path)
    return onnxruntime_file(path)


def onnxruntime_file(path: Path) -> Runner:
    """An ONNX file in ONNX Runtime."""
    run = onnx_export.load_onnx(path)
    return Runner(run, path.stat().st_size, torch.contiguous_format)


def openvino_ours(path: Path) -> Runner:
    """Our Q/DQ file in OpenVINO."""
    import openvino

    return _openvino_runner(openvino.Core().read_model(path), path.stat().st_size)


def onnxruntime_own(model: ResNet18, calibration: ImageSet, folder: Path) -> Runner:
    """ONNX Runtime's own static quantizer: Q/DQ, u8s8, one weight scale a channel."""
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def __init__(self):
            self._batches = iter(batches(calibration, CALIBRATION_BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            images, _ = next(self._batches, (None, None))
            return None if images is None else {"images": images.contiguous().numpy()}

    fp32, path = folder / "fp32.onnx", folder / "onnxruntime_int8.onnx"
    _export_fp32(model, fp32)
    with _quiet_logging():
        ort.quantize_static(
            fp32,
            path,
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
        )
    return onnxruntime_file(path)


def openvino_own(model: ResNet18, calibration: ImageSet, folder: Path) -> Runner:
    """NNCF's post-training quantization, run in OpenVINO."""
    with _quiet_logging():
        import nncf
        import openvino

        fp32, path = folder / "fp32_nncf.onnx", folder / "openvino_int8.xml"
        _export_fp32(model, fp32)
        images = normalize(calibration.images).contiguous().numpy()
        dataset = nncf.Dataset([image[None] for image in images])
        quantized = nncf.quantize(
            openvino.Core().read_model(fp32), dataset, subset_size=len(images)
        )
        openvino.save_model(quantized, path, compress_to_fp16=False)
    size_bytes = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return _openvino_runner(quantized, size_bytes)


def _export_fp32(model: ResNet18, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the TorchScript exporter, which needs no more packages
        torch.onnx.export(
            fold_batch_norm(model),
            (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),),
            path,
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
            opset_version=onnx_export.OPSET,
        )


@contextlib.contextmanager
def _quiet_logging():
    """Keep the quantizers' notes and progress bars away from the benchmark's own."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


# --- the yardstick -------------------------------------------------------------------------------


def measure_gemm_rate() -> float:
    """Return the INT8 multiply-accumulates a second of square u8·s8 products, at their best.

    Of all sizes, and of the linear kernels of all engines.
    """
    rates = []
    for engine, size in itertools.product(engines.candidate_engines(), GEMM_SIZES):
        with engines.quiet_torch(engine):
            weight = torch.quantize_per_channel(
                torch.randn(size, size), torch.full((size,), 0.02),
                torch.zeros(size, dtype=torch.int64), 0,
                torch.qint8,
            )  # fmt: skip
            packed = torch.ops.quantized.linear_prepack(weight, None)
            matrix = torch.quantize_per_tensor(torch.rand(size, size), 0.004, 0, torch.quint8)

        def multiply(_: torch.Tensor, matrix=matrix, packed=packed) -> torch.Tensor:
            return torch.ops.quantized.linear(matrix, packed, 1.0, 0)

        contenders = [Contender(f"GEMM {size}", multiply)]
        timings = time_interleaved(contenders, torch.zeros(1, 3, 1, 1), [1], GEMM_SECONDS)
        rates.append(1000 * size**3 / timings[contenders[0].name][0].median_ms)
    return max(rates)
