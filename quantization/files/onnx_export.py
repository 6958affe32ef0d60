"""Networks as ONNX files: INT8 with the scales and zero points that every engine runs, or FP32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.command.cli import UserError
from common.files.atomic import replace_file
from common.network.execution import Network
from quantization.int8.engines.base import value_shapes
from quantization.int8.network import Int8Network


def require_packages() -> None:
    """Check that the optional packages are there, before any long work.

    Raises:
        UserError: onnx or onnxruntime is missing; says how to install both.
    """
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--export-onnx needs {' and '.join(missing)}: pip install onnx onnxruntime"
        )


def export_onnx(network: Int8Network | Network, path: Path) -> None:
    """Write a network to a file that onnx has checked.

    Its input is ``images`` (normalised, float32; the batch size is free), its output ``logits``.
    The metadata of an INT8 network are JSON: ``classes``, ``mean`` and ``std``.
    """
    content = to_onnx(network)
    replace_file(path, lambda file: file.write(content))


def to_onnx(network: Int8Network | Network) -> bytes:
    """Return a network as the content of an ONNX file; see :func:`export_onnx`."""
    import onnx

    from quantization.files import qdq

    plain = _plain_int8(network) if isinstance(network, Int8Network) else _plain_fp32(network)
    model = qdq.build_model(plain)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def load_onnx(source: Path | bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load an ONNX file into ONNX Runtime on the CPU, at as many threads as torch has.

    Args:
        source: The file, or its content.

    Returns:
        Maps normalised images (float32, (N, C, H, W)) to logits (float32, (N, classes)).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin would take the cores from whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        source if isinstance(source, bytes) else str(source),
        options,
        providers=["CPUExecutionProvider"],
        # It would quantize layers that were left in FP32 between INT8 ones.
        disabled_optimizers=["WeightBiasQuantization"],
    )
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _plain_int8(network: Int8Network) -> object:
    from quantization.files.qdq import PlainNetwork, Weights

    layers = {
        name: Weights(
            layer.weight.numpy(),
            layer.bias.numpy(),
            layer.scales.numpy() if layer.is_int8 else None,
        )
        for name, layer in network.layers.items()
    }
    return PlainNetwork(
        network.graph.to_json(),
        value_shapes(network),
        layers | _plain_layers(network.affine),
        {name: (kept.scale, kept.zero_point) for name, kept in network.ranges.items()},
        {
            "classes": list(network.classes),
            "mean": list(network.mean),
            "std": list(network.std),
        },
    )


def _plain_fp32(network: Network) -> object:
    from quantization.files.qdq import PlainNetwork

    return PlainNetwork(network.graph.to_json(), network.shapes, _plain_layers(network.layers))


def _plain_layers(layers: dict) -> dict:
    from quantization.files.qdq import Weights

    return {
        name: Weights(*(np.ascontiguousarray(t.detach().numpy()) for t in (x.weight, x.bias)))
        for name, x in layers.items()
    }
