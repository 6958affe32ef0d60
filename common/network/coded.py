"""A network of coded INT8 weights, and its file: levels in few bits, and what they are worth.

The file is safetensors:

* ``levels``: those of all INT8 layers, in network order, as :mod:`common.files.entropy` codes them;
* ``scales`` and ``biases``: of all output channels, FP16 where that is exact, FP32 elsewhere;
  of scales that follow on one another and are equal the first, and in ``scale_runs`` (int32) how
  many they are;
* ``activation_scales`` (FP32) and ``activation_zero_points`` (uint8): of the input, of the blocks'
  sums, of the layers' outputs, in network order;
* ``fp32_weights``: those of the layers that are kept in FP32, where there are any;
* metadata: the mark, the version, how the network was made, and the SHA-256 of all that.

A level times its channel's scale is a weight. No pickle and no type of torch's quantization is in
it, so that it outlives them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.files import entropy
from common.files.atomic import replace_file
from common.files.untrusted import check_file, damage_told
from common.network.resnet import ResNet18, Widths, batch_norm_after, count_weights, prunable_layers

MARK, VERSION = "resnet18-cifar10-coded", "1"
SUFFIX = ".safetensors"
FP32_WEIGHTS = "fp32_weights"
MIN_BITS_PER_WEIGHT = 0.05  # below what a network that still classifies can take
JSON_FIELDS = ("widths", "fp32_layers", "settings")
NORM_EPSILON = 1e-5  # torch's; a variance of one less of it divides by exactly 1


@dataclass(frozen=True)
class CodedLayer:
    """A convolution or linear layer, its batch-norm folded.

    Attributes:
        weight: Levels (int8), or weights (float32) where it is kept in FP32.
        scales: What a level is worth in each output channel (float32, ones in FP32).
        bias: Float32, one an output channel.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    @property
    def is_int8(self) -> bool:
        """Whether the layer runs in INT8."""
        return self.weight.dtype == torch.int8

    def matrix(self) -> np.ndarray:
        """Return the levels as int8, (outputs, inputs, positions of the kernel)."""
        return self.weight.reshape(_matrix_shape(self.weight.shape)).numpy()

    def dense(self) -> torch.Tensor:
        """Return the weights in float32."""
        return self.weight * self.scales.view(-1, *[1] * (self.weight.ndim - 1))


@dataclass(frozen=True)
class CodedNetwork:
    """A whole network.

    Attributes:
        layers: By the names and in the order of ``prunable_layers``.
        activation_scales: Float32; of the input, of the blocks' sums, of the layers' outputs.
        activation_zero_points: The same, int64, 0 to 255.
        settings: How it was made, as JSON can say it.
    """

    layers: Mapping[str, CodedLayer]
    activation_scales: torch.Tensor
    activation_zero_points: torch.Tensor
    settings: Mapping[str, object]

    @property
    def widths(self) -> Widths:
        """How many channels the network has where."""
        return Widths.of({f"{name}.weight": layer.weight for name, layer in self.layers.items()})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the FP32 state dict; its batch-norms do nothing but add the biases."""
        state = ResNet18(self.widths).state_dict()
        for name, layer in self.layers.items():
            state[f"{name}.weight"] = layer.dense()
            if name == "linear":
                state["linear.bias"] = layer.bias
                continue
            norm = batch_norm_after(name)
            state[f"{norm}.bias"] = layer.bias
            state[f"{norm}.running_var"] = torch.full_like(layer.bias, 1 - NORM_EPSILON)
        return state


def save_coded(network: CodedNetwork, path: Path) -> int:
    """Write a network whole or not at all; return the file's size in bytes."""
    layers = network.layers.values()
    levels = [layer.matrix() for layer in layers if layer.is_int8]
    scales, runs = torch.cat([layer.scales for layer in layers]).unique_consecutive(
        return_counts=True
    )
    tensors = {
        "levels": torch.frombuffer(bytearray(entropy.encode(levels)), dtype=torch.uint8),
        "scales": _short(scales),
        "scale_runs": runs.to(torch.int32),
        "biases": _short(torch.cat([layer.bias for layer in layers])),
        "activation_scales": network.activation_scales,
        "activation_zero_points": network.activation_zero_points.to(torch.uint8),
    }
    if fp32 := [layer.weight.flatten() for layer in layers if not layer.is_int8]:
        tensors[FP32_WEIGHTS] = torch.cat(fp32)
    metadata = {
        "format": MARK,
        "version": VERSION,
        "widths": json.dumps([network.widths.stages, network.widths.inner]),
        "fp32_layers": json.dumps(
            [name for name, layer in network.layers.items() if not layer.is_int8]
        ),
        "settings": json.dumps(network.settings),
    }
    metadata["sha256"] = _checksum(tensors, metadata)
    replace_file(path, lambda file: file.write(save(tensors, metadata)))
    return path.stat().st_size


def is_coded(path: Path) -> bool:
    """Return whether a file bears this format's mark; it may be anything, or nothing."""
    if not path.is_file():  # to open a named pipe would be to wait for its writer
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == MARK
    except (SafetensorError, OSError):
        return False


def load_coded(path: Path) -> CodedNetwork:
    """Read what :func:`save_coded` wrote; memory is bounded by the file's size and the widths.

    Raises:
        UserError: The file is missing, damaged, or not one of ours.
    """
    check_file(path)
    errors = (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError)
    with damage_told(path, "coded network", *errors):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != MARK:
            raise ValueError("without its mark")
        if metadata.get("version") != VERSION:
            raise ValueError(f"version {metadata.get('version', '')[:20]} is not known here")
        if _checksum(tensors, metadata) != metadata.get("sha256"):
            raise ValueError("checksum differs")
        return _decode(tensors, {k: json.loads(metadata.get(k, "")) for k in JSON_FIELDS})


def _decode(tensors: Mapping[str, torch.Tensor], fields: Mapping[str, object]) -> CodedNetwork:
    """Return the network of a file; nothing in it is trusted.

    Raises:
        ValueError, TypeError: It is none.
    """
    stages, inner = fields["widths"]
    widths = Widths(tuple(stages), tuple(inner))
    _check_weight_count(widths, tensors["levels"].numel())
    with torch.device("meta"):
        layers = prunable_layers(ResNet18(widths))
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    kept = fields["fp32_layers"]
    if not isinstance(kept, list) or not set(kept) <= shapes.keys():
        raise ValueError("FP32 layers that no such network has")
    if not isinstance(fields["settings"], dict):
        raise ValueError("its settings are none")
    _check_tensors(tensors, shapes, kept)
    int8 = [name for name in shapes if name not in kept]
    levels = entropy.decode(
        tensors["levels"].numpy().tobytes(), [_matrix_shape(shapes[name]) for name in int8]
    )
    weights = dict(zip(int8, map(torch.from_numpy, levels), strict=True))
    if kept:
        sizes = [shapes[name].numel() for name in kept]
        weights |= zip(kept, tensors[FP32_WEIGHTS].split(sizes), strict=True)
    outputs = [shape[0] for shape in shapes.values()]
    runs = tensors["scale_runs"].long()
    scales = tensors["scales"].float().repeat_interleave(runs).split(outputs)
    biases = tensors["biases"].float().split(outputs)
    layers = {
        name: CodedLayer(weights[name].reshape(shape), scale, bias)
        for (name, shape), scale, bias in zip(shapes.items(), scales, biases, strict=True)
    }
    zero_points = tensors["activation_zero_points"].long()
    return CodedNetwork(layers, tensors["activation_scales"], zero_points, fields["settings"])


def _check_weight_count(widths: Widths, stream_bytes: int) -> None:
    """Check that a stream is long enough for a network of these widths.

    Decoding takes memory and time by the number of weights, and a stream of zeros is very short.
    """
    weights = count_weights(widths)
    if weights > max(count_weights(Widths()), 8 * stream_bytes / MIN_BITS_PER_WEIGHT):
        raise ValueError(f"{stream_bytes:,} bytes are too few for {weights:,} weights")


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], kept: list[str]
) -> None:
    """Check names, shapes, types and ranges."""
    channels = sum(shape[0] for shape in shapes.values())
    runs = tensors["scale_runs"]
    # How many activations there are is the INT8 model's to check.
    activations = tensors["activation_scales"].flatten().shape
    halves = (torch.float16, torch.float32)
    expected = {
        "levels": (tensors["levels"].flatten().shape, (torch.uint8,)),
        "scales": (runs.flatten().shape, halves),
        "scale_runs": (runs.flatten().shape, (torch.int32,)),
        "biases": ((channels,), halves),
        "activation_scales": (activations, (torch.float32,)),
        "activation_zero_points": (activations, (torch.uint8,)),
    }
    if kept:
        expected[FP32_WEIGHTS] = ((sum(shapes[n].numel() for n in kept),), (torch.float32,))
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        raise ValueError(f"{odd[:60]} is missing or unexpected")
    for name, (shape, dtypes) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise ValueError(f"{name} has another shape or type")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        if "scale" in name and not (tensor > 0).all():
            raise ValueError(f"{name} are not positive")
    if int(runs.sum()) != channels:
        raise ValueError("scales are not as many as output channels")


def _matrix_shape(shape: torch.Size) -> tuple[int, int, int]:
    return shape[0], shape[1], shape[2:].numel()


def _short(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values in FP16, where they are the same."""
    return values.half() if torch.equal(values.half().float(), values) else values


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything but the checksum itself."""
    entries = sorted(entry for entry in metadata.items() if entry[0] != "sha256")
    digest = hashlib.sha256(repr(entries).encode())
    for name in sorted(tensors):
        header = f"{name} {tensors[name].dtype} {list(tensors[name].shape)}"
        digest.update(header.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
