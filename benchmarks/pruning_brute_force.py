"""Time the pruning analysis against the usual, brute-force way, on the same images.

    python benchmarks/pruning_brute_force.py --test-images 1000

Both scan all 21 layers at 90 % and search the linear layer, in one process, at equal threads. The
usual way takes a deep copy a layer and a step and runs every image through the whole network, NCHW;
with ``--channels-last`` it is given the faster memory layout too. Prints the times, and checks the
counts layer by layer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli

AMOUNT, TOLERANCE = 0.9, 0.02


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    arguments.add_shared_arguments(
        parser, cli.REPOSITORY / "results" / "pruning_brute_force", with_report=False
    )
    parser.set_defaults(batch_size=16, test_images=1000, device="cpu")
    parser.add_argument(
        "--channels-last", action="store_true", help="brute force in channels_last instead of NCHW"
    )
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Run both ways, compare their counts, write and print the times."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    begun = time.perf_counter()

    import torch

    from common.files import output
    from common.inputs import load_inputs
    from common.machine import device
    from common.machine.workers import Workers
    from common.network.resnet import prunable_layers
    from common.report import results as report
    from common.run import finish_run, print_results
    from pruning.alone import brute_force
    from pruning.alone.linear import binary_search, required_correct

    device.set_threads(args.threads)
    place = device.choose_device(args.device)
    with output.OutputFolder(args.output_dir, args.overwrite) as folder:
        inputs = load_inputs(args, Path(__file__).parent)
        model, test = inputs.model.to(place), inputs.test.to(place)
        seconds, counts, found = run_ours(model, test, args.batch_size)
        started = time.perf_counter()
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        dense = int(brute_force.classify_all(model, test, layout).sum())
        scanned = brute_force.scan_brute_force(
            model, test, list(prunable_layers(model)), AMOUNT, layout
        )
        required = required_correct(dense, len(test), TOLERANCE)

        def correct_at(count: int) -> int:
            pruned = brute_force.pruned_copy(model, "linear", count)
            return int(brute_force.classify_all(pruned, test, layout).sum())

        usual_found, steps = binary_search(correct_at, model.linear.weight.numel(), required)
        usual_seconds = time.perf_counter() - started

        results = report.common_results(
            "pruning_brute_force", args, Workers(place), inputs.describe_images(), inputs.weights
        )
        usual_counts = {"dense": dense} | {name: int(c.sum()) for name, c in scanned.items()}
        results |= {
            "seconds": {**seconds, "brute_force": usual_seconds},
            "brute_force_passes": 1 + len(scanned) + len(steps),
            "speedup": usual_seconds / seconds["all"],
            "found": {"ours": found, "brute_force": usual_found},
            "rows": [
                {"layer": name, "ours": counts[name], "brute_force": usual_counts[name]}
                for name in usual_counts
            ],
        }
        finish_run(results, folder, begun)
    print_results(results, format_results(results), args.json)
    return cli.EXIT_DONE


def run_ours(model, test, batch_size: int) -> tuple[dict, dict, int]:
    """Run pruning.py's own analysis, from describing the structure to confirming the answer.

    Writing the pruned model is left out: the usual way writes nothing either.

    Returns:
        Seconds by chapter, correct images by layer, and pruned weights of the linear layer.
    """
    from common.machine.device import bf16_pays
    from common.measure.evaluate import predict
    from common.network.resnet import prunable_layers
    from pruning.alone.linear import search_linear
    from pruning.alone.scan import Scan, run_scan
    from pruning.masks import copy_without, l1_mask
    from pruning.report.results import describe_scan

    started = time.perf_counter()
    fast = test.images.device.type == "cpu" and bf16_pays()
    scan = Scan(model, test, list(prunable_layers(model)), [AMOUNT], batch_size, fast)
    with tempfile.TemporaryDirectory() as scratch:
        scanned, scan_seconds = run_scan(scan, Path(scratch) / "journal")
    describe_scan(scanned, model, [AMOUNT])
    search_started = time.perf_counter()
    labels = test.labels.cpu()
    found = search_linear(model.linear, scanned.features, labels, TOLERANCE, seed=0).found
    search_seconds = time.perf_counter() - search_started
    kept = l1_mask(model.linear.weight.cpu(), found)
    predict(copy_without(model, {"linear": kept}).to(test.images.device), test, batch_size)
    counts = {"dense": int(scanned.dense_correct.sum())}
    counts |= {layer: int(c.sum()) for (_, layer), c in scanned.correct.items()}
    seconds = {
        "scan": scan_seconds, "search": search_seconds, "all": time.perf_counter() - started
    }  # fmt: skip
    return seconds, counts, found


def format_results(results: dict) -> str:
    """Lay out the counts and the times."""
    from common.report.results import format_table

    rows = [[r["layer"], f"{r['ours']:,}", f"{r['brute_force']:,}"] for r in results["rows"]]
    seconds, found = results["seconds"], results["found"]
    same = sum(r["ours"] == r["brute_force"] for r in results["rows"])
    return "\n".join(
        [
            format_table(["correct images of", "ours", "brute force"], rows),
            f"{same} of {len(rows)} counts are the same; the search prunes {found['ours']:,} "
            f"and {found['brute_force']:,} weights",
            f"ours {seconds['all']:.1f} s (scan {seconds['scan']:.1f} s, search "
            f"{seconds['search']:.1f} s), brute force {seconds['brute_force']:.1f} s in "
            f"{results['brute_force_passes']} passes: {results['speedup']:.1f} times faster",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
