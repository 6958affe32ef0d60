"""What other tools make of the same network without training it, and this project's own answers."""

import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import NNCODEC, ONNX_RUNTIME, OURS, TORCH_PRUNING, runtimes
from benchmarks.runtimes import ONNXRUNTIME_FILE, Run, has_packages, onnxruntime_own
from common.command.cli import UserError
from common.images.data import ImageSet
from common.inputs import Inputs
from common.measure.evaluate import predict
from common.network.execution import Network
from common.network.graph import PAD
from common.network.tracing import trace_network
from pruning.channels.groups import find_groups
from pruning.together.recalibration import recalibrate_batch_norm
from quantization.files.artifact import load_int8
from quantization.int8 import conversion, engines
from quantization.settings import Settings

QUANTIZER_STEPS = (-38, -34, *range(-32, 0, 2))  # values of NNCodec's qp; higher is coarser
CHANNEL_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
# A tool goes no further once fewer calibration images than this get the dense network's class: by
# then, several points are lost.
LEAST_ALIKE = 0.9
ZSTD_LEVEL = 19


@dataclass(frozen=True)
class Compressed:
    """A network that a tool made smaller or faster."""

    method: str  # name of the tool
    setting: str  # how far it was asked to go
    size_bytes: int  # size of the file
    run: Run
    timed: bool = True  # it runs in INT8; NNCodec's networks become dense FP32 when decoded


def nncodec(inputs: Inputs) -> Iterator[Compressed]:
    """Code the state dict at several quantizer steps, and decode it (ISO/IEC 15938-17)."""
    from nncodec.nn import decode, encode

    dense = predict(inputs.model, inputs.calibration)
    tensors = {
        name: tensor.float().numpy()
        for name, tensor in inputs.model.state_dict().items()
        if tensor.is_floating_point()
    }
    for step in QUANTIZER_STEPS:
        with tempfile.TemporaryDirectory() as folder:  # the encoder leaves its stream there
            options = {"qp": step, "use_dq": True, "verbose": False, "results": folder}
            stream = encode(tensors, args=options)
        decoded = {name: torch.from_numpy(np.array(a)) for name, a in decode(stream).items()}
        model = copy.deepcopy(inputs.model)
        model.load_state_dict(decoded, strict=False)
        run = engines.fp32_runner(trace_network(model.eval(), inputs.test.shape))
        yield Compressed(NNCODEC, f"qp {step}", len(stream), run, False)
        if _alike(run, inputs.calibration, dense) < LEAST_ALIKE:
            return


def torch_pruning(
    inputs: Inputs, settings: Settings, batch_size: int, folder: Path
) -> Iterator[Compressed]:
    """Remove channels of small norm, estimate batch norms again, and make it INT8."""
    import torch_pruning as tp

    example = torch.zeros(1, *inputs.test.shape)
    calibration, fixed = inputs.calibration, _fixed_layers(inputs.traced.network)
    dense = predict(inputs.model, calibration)
    for share in CHANNEL_SHARES:
        model = copy.deepcopy(inputs.model)
        tp.pruner.BasePruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=share,
            ignored_layers=[model.get_submodule(name) for name in fixed],
        ).step()  # fmt: skip
        model = _choose_statistics(model.eval(), calibration, dense)
        network = trace_network(model, inputs.test.shape)
        observation = conversion.observe(network, calibration, settings.observer, batch_size)
        int8 = conversion.convert(observation, settings)
        runtime = runtimes.ours(settings.engine, int8, folder)
        setting = f"{share:.0%} of channels, INT8"
        yield Compressed(TORCH_PRUNING, setting, runtime.size_bytes, runtime.run)
        if _alike(runtime.run, calibration, dense) < LEAST_ALIKE:
            return


def _alike(run: Run, images: ImageSet, dense: torch.Tensor) -> float:
    """Return the fraction of images to which a network gives the ``dense`` one's classes."""
    return float((predict(run, images) == dense).double().mean())


def _choose_statistics(model: nn.Module, images: ImageSet, dense: torch.Tensor) -> nn.Module:
    """Return a pruned network, its batch norms estimated again if it then answers more alike.

    Where few channels went, estimating again can cost more than it mends: on ResNet-56 two points.
    """
    again = copy.deepcopy(model)
    recalibrate_batch_norm(again, images)
    return max((model, again), key=lambda one: _alike(one, images, dense))


def _fixed_layers(network: Network) -> list[str]:
    """Return the layers that Torch-Pruning shall not narrow: the last one, which gives the logits.

    It does not follow channels through shortcuts that add channels of zeros, as ResNet-56 has, and
    makes networks that do not run. There all layers stay whose channels these shortcuts tie.
    """
    layers = list(network.graph.layers)
    pads = [o.attributes["padding"] for o in network.graph.operations if o.kind == PAD]
    if all(not any(padding[4:]) for padding in pads):
        return layers[-1:]
    free = {name for group in find_groups(network).values() for name in group.producers}
    return [name for name in layers if name not in free]


def onnx_runtime(inputs: Inputs, folder: Path) -> Compressed:
    """Quantize by ONNX Runtime's own quantizer; the file is packed with zstd."""
    import zstandard

    runtime = onnxruntime_own(inputs.traced.network, inputs.calibration, folder)
    packed = zstandard.compress((folder / ONNXRUNTIME_FILE).read_bytes(), level=ZSTD_LEVEL)
    return Compressed(ONNX_RUNTIME, "INT8", len(packed), runtime.run)


def ours(inputs: Inputs, folder: Path, engine: str) -> Iterator[Compressed]:
    """Read the answers of pipeline.py from its folder.

    Raises:
        UserError: There are none for this checkpoint, these test images and this seed.
    """
    try:
        results = json.loads((folder / "results.json").read_bytes())
        answers = {answer["name"]: folder / answer["file"] for answer in results["answers"]}
        budget = results["budget"]["max_drop"]
        same = (
            results["weights"]["sha256"] == inputs.weights["sha256"]
            and results["data"]["test_images"] == len(inputs.test)
            and results["arguments"]["seed"] == inputs.seed
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}: no results of pipeline.py ({error})") from None
    if not same:
        raise UserError(f"{folder}: results for another checkpoint, other test images or seed")
    for name, path in answers.items():
        size_bytes = path.stat().st_size
        yield Compressed(OURS, f"{name}, within {budget:.1%}", size_bytes, load_int8(path, engine))


def compress(
    inputs: Inputs, settings: Settings, batch_size: int, pipeline: Path, folder: Path
) -> Iterator[Compressed]:
    """Yield what each tool makes of a network; ``folder`` is for temporary files."""
    yield from ours(inputs, pipeline, settings.engine)
    if has_packages(("onnx", "onnxruntime", "zstandard"), ONNX_RUNTIME):
        yield onnx_runtime(inputs, folder)
    if has_packages(("torch_pruning",), TORCH_PRUNING):
        yield from torch_pruning(inputs, settings, batch_size, folder)
    if has_packages(("nncodec",), NNCODEC):
        yield from nncodec(inputs)
