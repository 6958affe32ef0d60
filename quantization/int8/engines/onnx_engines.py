"""Runs INT8 networks in ONNX Runtime and OpenVINO, which both read ONNX."""

import threading
from dataclasses import replace

import torch

from quantization.files.onnx_export import load_onnx, to_onnx
from quantization.int8.engines.base import Int8Model, PreparedSizes, Run
from quantization.int8.network import Int8Network


class OnnxRuntimeRunner(Int8Model):
    """Runs an INT8 network in ONNX Runtime."""

    def __init__(self, network: Int8Network, engine: str = "onnxruntime"):
        super().__init__(network, engine)
        self._session = load_onnx(_to_onnx(network))

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return self._session(images.contiguous())


class OpenVinoRunner(Int8Model):
    """Runs an INT8 network in OpenVINO."""

    def __init__(self, network: Int8Network, engine: str = "openvino"):
        super().__init__(network, engine)
        self._programs = openvino_programs(_to_onnx(network), self._shape)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return self._programs[len(images)](images)


def openvino_programs(source: object, image_shape: tuple[int, ...]) -> PreparedSizes:
    """Return OpenVINO's programs for batch sizes, at as many threads as torch has.

    ``source`` is the content of an ONNX file, or an ``openvino.Model``.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(source) if isinstance(source, bytes) else source
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def prepare(size: int | None) -> Run:
        fixed = model.clone()  # OpenVINO optimises best for a fixed shape
        fixed.reshape([-1 if size is None else size, *image_shape])
        request = core.compile_model(fixed, "CPU", settings).create_infer_request()
        lock = threading.Lock()  # a request serves one call at a time

        def run(images: torch.Tensor) -> torch.Tensor:
            with lock:
                outputs = request.infer([images.contiguous().numpy()], share_inputs=True)
                return torch.from_numpy(outputs[0].copy())

        return run

    return PreparedSizes(prepare)


def _to_onnx(network: Int8Network) -> bytes:
    """Return a network as ONNX, its logits not rounded to levels: that would be one more kernel."""
    ranges = {name: own for name, own in network.ranges.items() if name != network.graph.output}
    return to_onnx(replace(network, ranges=ranges))


RUNNERS = {"onnxruntime": OnnxRuntimeRunner, "openvino": OpenVinoRunner}
