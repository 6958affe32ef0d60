"""Measure what share of an evaluation goes into loading images, rather than into the network.

    python benchmarks/loader_overhead.py --threads 2

Each round loads and normalises the 10,000 bundled test images as an evaluation does, and runs the
FP32 network, channels_last, on the first 384 of them; medians of the rounds are compared per image.
On two Zen 4 cores: 8.7 µs of 5.65 ms, 0.15 % (one thread: 10.3 µs of 10.3 ms, 0.10 %). On a machine
whose cores are taken, threads waiting for each other can swell the loader's part tenfold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from common.command.argument_types import batch_size, positive_int, thread_count
from common.report.results import format_table, percent


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    parser.add_argument("--batch-size", type=batch_size, metavar="N", default=64)
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads")
    parser.add_argument("--rounds", type=positive_int, metavar="N", default=5)
    parser.add_argument(
        "--network-images",
        type=positive_int,
        metavar="N",
        default=384,
        help="images that the network is run on in each round",
    )
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Time loading and computing in turns, and print both per image."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(quiet=False)

    import torch

    from common.images.data import Cifar10, batches, load_images
    from common.images.sources import bundled_source
    from common.machine.device import set_threads
    from common.network.checkpoint import BUNDLED_WEIGHTS, load_model

    set_threads(args.threads)
    model = load_model(BUNDLED_WEIGHTS).to(memory_format=torch.channels_last)
    images = load_images(bundled_source(), "test", None, seed=0)
    few = Cifar10(images.images[: args.network_images], images.labels[: args.network_images])
    normalized = [batch for batch, _ in batches(few, args.batch_size)]

    def load() -> float:
        start = time.perf_counter()
        for _ in batches(images, args.batch_size):
            pass
        return (time.perf_counter() - start) / len(images)

    @torch.inference_mode()
    def compute() -> float:
        start = time.perf_counter()
        for batch in normalized:
            model(batch)
        return (time.perf_counter() - start) / len(few)

    load(), compute()  # warm up
    rounds = [(load(), compute()) for _ in cli.progress(range(args.rounds), "rounds", unit="round")]
    load_seconds, compute_seconds = map(statistics.median, zip(*rounds, strict=True))
    share = load_seconds / (load_seconds + compute_seconds)
    rows = [
        ["loading and normalising", f"{1e6 * load_seconds:.1f}", percent(share)],
        ["FP32 network", f"{1e6 * compute_seconds:.1f}", percent(1 - share)],
    ]
    print(format_table(["per image", "µs", "share"], rows))
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
