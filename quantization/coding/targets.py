"""What the layers of a network should give once they are coded, at a few places of many images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from common.images.data import ImageSet
from common.network import sampling
from common.network.execution import Network
from common.network.walk import images_in_memory

BATCH_SIZE = 50
POSITIONS = 8  # random positions of each image's outputs that a layer is coded on


@dataclass(frozen=True)
class Original:
    """The network that another one was made from."""

    network: Network  # original network
    # Indices (int64) of the original output channels that are left, for each layer that lost some;
    # None for a layer whose outputs training changed.
    channels: Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Targets:
    """Outputs that the layers of a network should give; the same at every price of a bit."""

    images: Sequence[torch.Tensor]  # normalised, in batches: (n, C, H, W)
    # By layer and batch, the positions of the outputs, (n, P); None for a linear layer's.
    positions: Mapping[str, Sequence[torch.Tensor | None]]
    # By layer and batch, the outputs there, or the sums that it completes: float16, (rows, O).
    outputs: Mapping[str, Sequence[torch.Tensor]]


@torch.inference_mode()
def record_targets(
    network: Network, calibration: ImageSet, seed: int = 0, original: Original | None = None
) -> Targets:
    """Run the network that an FP32 network on the CPU was made from, and note what its layers give.

    Each calibration image is used as it is and mirrored, as far as memory allows; labels are not
    used. ``seed`` draws the positions. A layer whose outputs training changed should give what it
    gives now. ``original`` is the network that this one was made from, if any.
    """
    original = original or Original(network, {})
    pixels = calibration.with_mirrored().images
    count = images_in_memory(len(pixels), [original.network, network], torch.float16.itemsize)
    images = [calibration.normalize(batch) for batch in pixels[:count].split(BATCH_SIZE)]
    generator = torch.Generator().manual_seed(seed)
    most = POSITIONS * len(pixels) // count
    layers = network.graph.layers
    positions = {
        name: [
            sampling.draw_positions((len(batch), *network.shapes[name]), most, generator)
            for batch in images
        ]
        for name in layers
    }
    own = {name for name in layers if original.channels.get(name, ()) is None}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for source, names in ((original.network, set(layers) - own), (network, own)):
        parts = {name: _parts_of_sum(network, name) for name in names}
        wanted = sorted(set().union(*parts.values()))
        for index, batch in enumerate(images if names else ()):
            values = source.run({source.graph.input: batch}, wanted)
            for name in names:
                where = positions[name][index]
                y = sum(sampling.outputs_at(values[part], where) for part in parts[name])
                channels = original.channels.get(name)
                outputs[name].append((y if channels is None else y[:, channels]).half())
    return Targets(images, positions, outputs)


def _parts_of_sum(network: Network, layer: str) -> tuple[str, ...]:
    """Return the values whose sum a layer completes: its own, and perhaps another operand."""
    _, operand = sampling.completed_sum(network, layer)
    return (layer, operand) if operand else (layer,)
