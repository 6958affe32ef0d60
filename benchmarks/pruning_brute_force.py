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
from common import arguments, cli

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

    import torch

    from common import device, output, report
    from common.inputs import load_inputs
    from common.model import prunable_layers
    from common.workers import Workers
    from pruning import brute_force, search

    device.set_threads(args.threads)
    place = device.choose_device(args.device)
    with output.OutputFolder(args.output_dir, args.overwrite) as folder:
        inputs = load_inputs(**arguments.input_choices(args), script_dir=Path(__file__).parent)
        model, test = inputs.model.to(place), inputs.test.to(place)
        seconds, counts, found = run_ours(model, test, args.batch_size)
        started = time.perf_counter()
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        dense = int(brute_force.classify_all(model, test, layout).sum())
        scanned = brute_force.scan_brute_force(
            model, test, list(prunable_layers(model)), AMOUNT, layout
        )
        required = search.required_correct(dense, len(test), TOLERANCE)
        total = model.linear.weight.numel()
        usual_found, steps = brute_force.search_brute_force(model, test, required, total, layout)
        usual_seconds = time.perf_counter() - started

        results = report.common_results(
            "pruning_brute_force", args, Workers(place), inputs.describe_images(), inputs.weights
        )
        usual_counts = {"dense": dense} | {name: int(c.sum()) for name, c in scanned.items()}
        results |= {
            "seconds": {**seconds, "brute_force": usual_seconds},
            "brute_force_passes": 1 + len(scanned) + steps,
            "speedup": usual_seconds / seconds["all"],
            "found": {"ours": found, "brute_force": usual_found},
            "rows": [
                {"layer": name, "ours": counts[name], "brute_force": usual_counts[name]}
                for name in usual_counts
            ],
        }
        report.write_json(folder.file(output.RESULTS_NAME), results)
        folder.commit()
    print(report.to_json(results) if args.json else format_results(results), end="")
    return cli.EXIT_DONE


def run_ours(model, test, batch_size: int) -> tuple[dict, dict, int]:
    """Run pruning.py's own analysis, from describing the structure to confirming the answer.

    Writing the pruned model is left out: the usual way writes nothing either.

    Returns:
        Seconds by chapter, correct images by layer, and pruned weights of the linear layer.
    """
    from common import size
    from common.cascade import has_bf16
    from common.model import prunable_layers
    from pruning import experiment, savings, search

    started = time.perf_counter()
    layers = size.describe_layers(model)
    experiment.describe_structure(model, layers)
    fast = test.images.device.type == "cpu" and has_bf16()
    with tempfile.TemporaryDirectory() as scratch:
        scanned, scan_seconds = experiment.run_scan(
            model, test, list(prunable_layers(model)), [AMOUNT], Path(scratch) / "journal", False,
            batch_size, fast,
        )  # fmt: skip
        search_started = time.perf_counter()
        labels = test.labels.cpu()
        _, found = search.search_linear(model, scanned.features, labels, TOLERANCE, None)
        search_seconds = time.perf_counter() - search_started
        pruned = savings.prune_linear(model, found).to(test.images.device)
        savings.confirm(pruned, test, scanned.features, scanned.dense_correct, batch_size)
    counts = {"dense": int(scanned.dense_correct.sum())}
    counts |= {layer: int(c.sum()) for (_, layer), c in scanned.correct.items()}
    seconds = {
        "scan": scan_seconds, "search": search_seconds, "all": time.perf_counter() - started
    }  # fmt: skip
    return seconds, counts, found


def format_results(results: dict) -> str:
    """Lay out the counts and the times."""
    from common.report import format_table

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
