"""Time the scan against one forward pass for each pruned layer, on torchvision's networks.

    python benchmarks/scan.py --threads 2
    python benchmarks/scan.py --networks resnet18,mobilenet_v2 --image-size 128

Networks have random weights and images are noise, which does not change the time. The passes are
those of the usual script: batch norms not folded, NCHW. "One batch" includes the preparation: masks
for the scan; a deep copy and torch's own pruning for each pass. It matters less with more batches.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from common.command.argument_types import list_of, name, positive_int

FAMILIES = (
    "resnet18", "resnet50", "mobilenet_v2", "vgg11_bn", "mobilenet_v3_small", "efficientnet_b0",
    "densenet121", "regnet_y_400mf", "googlenet", "squeezenet1_1", "shufflenet_v2_x1_0",
)  # fmt: skip
BATCH_SIZE, AMOUNT = 16, 0.9  # images in a batch; fraction of each layer that is pruned


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    parser.add_argument(
        "--networks", type=list_of(name), default=list(FAMILIES), metavar="NAME,...",
        help="networks of torchvision to scan",
    )  # fmt: skip
    parser.add_argument("--image-size", type=positive_int, default=64, help="pixels a side")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; all cores by default")
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Scan each network both ways and print the times."""
    args = build_parser().parse_args(argv)
    cli.import_torch()
    from common.machine import device
    from common.report.story import align

    device.set_up_cpu(args.threads)
    rows = [time_network(network, args.image_size)
            for network in cli.progress(args.networks, "networks")]  # fmt: skip
    header = ["network", "layers", "scan (s)", "passes (s)", "faster", "one batch", "error"]
    print(align(header, rows))
    return cli.EXIT_DONE


def time_network(network_name: str, size: int) -> list[str]:
    """Return a network's row of the table; the error is relative to the largest logit."""
    import torch
    import torchvision

    from common.network.branching import branch_logits, start_values
    from common.network.tracing import trace_network, weight_layers
    from pruning.alone.brute_force import pruned_copy
    from pruning.masks import l1_masks, masked_layers

    torch.manual_seed(0)
    options = {"init_weights": False} if network_name == "googlenet" else {}
    model = torchvision.models.get_model(network_name, weights=None, num_classes=10, **options)
    model = model.eval()
    images = torch.randn(BATCH_SIZE, 3, size, size)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    network = trace_network(model, (3, size, size))
    weights = {n: m.weight.detach() for n, m in weight_layers(model, network).items()}
    seconds = Counter()

    def timed(part: str, function: Callable, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        seconds[part] += time.perf_counter() - started
        return result

    def scan() -> torch.Tensor:
        wanted = start_values(network.graph, weights)
        dense = network.run({network.graph.input: laid_out}, wanted)
        return branch_logits(network, dense, variants)

    with torch.inference_mode():
        masks = timed("masks", l1_masks, weights, AMOUNT)
        variants = timed("masks", masked_layers, network, masks)
        scan()  # warm up
        found = timed("scan", scan)
        copies = (timed("copies", pruned_copy, model, {layer: AMOUNT}) for layer in weights)
        expected = torch.cat([timed("passes", pruned, images) for pruned in copies])
    error = float((found - expected).abs().max() / expected.abs().max())
    one_batch = (seconds["copies"] + seconds["passes"]) / (seconds["masks"] + seconds["scan"])
    return [
        network_name, str(len(weights)), f"{seconds['scan']:.2f}", f"{seconds['passes']:.2f}",
        f"{seconds['passes'] / seconds['scan']:.1f}×", f"{one_batch:.1f}×", f"{error:.0e}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
