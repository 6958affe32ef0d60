"""Networks as ONNX: written to files, and run in ONNX Runtime and OpenVINO, which both read it."""

import threading
from dataclasses import replace
from pathlib import Path

import torch

from common.files.atomic import replace_file
from common.network.execution import Network
from quantization.files.int8_file import plain_weights, to_plain
from quantization.int8.engines.base import Int8Model, PreparedSizes, Run
from quantization.int8.network import Int8Network
from runtime import decode


def export_onnx(network: Int8Network | Network, path: Path) -> None:
    """Write a network, INT8 or FP32, to a file that onnx has checked.

    INT8 keeps the scales and zero points that every engine runs. The input is ``images``
    (normalised, float32; the batch size is free), the output ``logits``. The metadata of an INT8
    network are JSON: ``classes``, ``mean``, ``std`` and more.
    """
    content = to_onnx(network)
    replace_file(path, content)


def to_onnx(network: Int8Network | Network) -> bytes:
    """Return the content of the file that :func:`export_onnx` writes."""
    if isinstance(network, Int8Network):
        plain = to_plain(network)
    else:
        weights = {name: plain_weights(x.weight, x.bias) for name, x in network.layers.items()}
        plain = decode.Network(network.graph.to_json(), weights)
    return decode.to_onnx(plain)


def load_onnx(source: Path | bytes) -> Run:
    """Load ONNX into ONNX Runtime, at as many threads as torch has; both ends are float32."""
    model = source if isinstance(source, bytes) else str(source)
    session = decode.start_session(model, torch.get_num_threads())

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


class OnnxRunner(Int8Model):
    """Runs an INT8 network in ONNX Runtime or OpenVINO."""

    def __init__(self, network: Int8Network, engine: str):
        super().__init__(network, engine)
        # The logits are not rounded to levels: that would be one more kernel.
        ranges = {name: own for name, own in network.ranges.items() if name != network.graph.output}
        model = to_onnx(replace(network, ranges=ranges))
        is_openvino = engine == "openvino"
        self._model = load_openvino(model, self._shape) if is_openvino else load_onnx(model)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        return self._model(images)


def load_openvino(source: object, image_shape: tuple[int, ...]) -> Run:
    """Load ONNX or an ``openvino.Model`` into OpenVINO, at as many threads as torch has."""
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

    programs = PreparedSizes(prepare)
    return lambda images: programs[len(images)](images)
