"""Networks as ONNX files: INT8 with the scales and zero points that every engine runs, or FP32."""

from collections.abc import Callable
from pathlib import Path

import torch

from common.files.atomic import replace_file
from common.network.execution import Network
from quantization.files.int8_file import plain_weights, to_plain
from quantization.int8.network import Int8Network
from runtime import decode


def export_onnx(network: Int8Network | Network, path: Path) -> None:
    """Write a network to a file that onnx has checked.

    Its input is ``images`` (normalised, float32; the batch size is free), its output ``logits``.
    The metadata of an INT8 network are JSON: ``classes``, ``mean``, ``std`` and more.
    """
    content = to_onnx(network)
    replace_file(path, lambda file: file.write(content))


def to_onnx(network: Int8Network | Network) -> bytes:
    """Return the content of the file that :func:`export_onnx` writes."""
    if isinstance(network, Int8Network):
        plain = to_plain(network)
    else:
        weights = {name: plain_weights(layer) for name, layer in network.layers.items()}
        plain = decode.Network(network.graph.to_json(), weights)
    return decode.to_onnx(plain)


def load_onnx(source: Path | bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load ONNX into ONNX Runtime, at as many threads as torch has; both ends are float32."""
    model = source if isinstance(source, bytes) else str(source)
    session = decode.start_session(model, torch.get_num_threads())
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
