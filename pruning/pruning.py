"""Find out which layers of a ResNet18 for CIFAR-10 can lose their weights, and how many.

    python pruning.py                           # bundled weights or your resnet18_cifar10.pth
    python pruning.py --weights my.pth --data-dir ~/cifar10 --amounts 0.5,0.7,0.9
    python pruning.py --scope all --recalibrate-bn     # how far can the whole network go?

Describes the structure; prunes each layer alone (L1, unstructured) and measures what that costs on
the same images; searches how far the linear layer can go within a tolerance, and proves the answer
against every possible amount; with --scope, how far all layers together. Writes the pruned model,
plain and packed, results.json and plots.

The scan goes through the images once, for all layers and amounts together. Its unit of progress is
sixteen batches of images: killed at any moment, ``--resume`` repeats at most that much.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import arguments, cli
from common.argument_types import fraction, image_count, list_of, name, one_of, positive_int

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "pruning"
JOURNAL_NAME = "scan.journal"
# Images in a batch. On a CPU small ones, which keep the activations of all branches in the cache.
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 16, 256
SENSITIVITY_CSV, CURVE_CSV = "sensitivity.csv", "linear_curve.csv"
# The choices of pruning.allocation, which imports torch, and --help must not.
ALLOCATIONS = ("uniform", "global", "sensitivity")
NEEDED_FLAGS = {
    "--allocation": "--scope",
    "--recalibrate-bn": "--scope",
    "--finetune-epochs": "--scope",
    "--finetune-images": "--finetune-epochs",
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(
        __doc__,
        epilog="examples:\n"
        "  python pruning.py\n"
        "  python pruning.py --amounts 0.5,0.7,0.9 --layers 'layer4.*,linear' --test-images all\n\n"
        f"A batch is {CPU_BATCH_SIZE} images on a CPU, where the activations of all branches then\n"
        f"stay in the cache, and {GPU_BATCH_SIZE} on a GPU, unless --batch-size says otherwise.",
    )
    arguments.add_shared_arguments(parser, DEFAULT_OUTPUT_DIR)
    parser.set_defaults(batch_size=None)
    scanning = parser.add_argument_group("sensitivity scan")
    amounts = scanning.add_mutually_exclusive_group()
    amounts.add_argument(
        "--amount", type=fraction, metavar="A", default=0.9,
        help="fraction of each layer's weights to prune",
    )  # fmt: skip
    amounts.add_argument(
        "--amounts", type=list_of(fraction), metavar="A,...",
        help="several fractions: adds a curve a layer and a heat map",
    )  # fmt: skip
    scanning.add_argument(
        "--layers", type=list_of(name), metavar="NAME,...",
        help="layers to prune, by name or pattern (layer4.*); all by default",
    )  # fmt: skip
    scanning.add_argument(
        "--precision", choices=("auto", "fp32"), default="auto",
        help="auto: on a CPU with bf16, branches run in bf16 and close cases again in FP32",
    )  # fmt: skip
    scanning.add_argument(
        "--resume", action="store_true",
        help="continue a scan that was stopped, if checkpoint, images and settings are the same",
    )  # fmt: skip
    scanning.add_argument(
        "--verify", action="store_true",
        help="run the brute force too (slow); fail if more than 1 in 1,000 predictions differ",
    )  # fmt: skip
    searching = parser.add_argument_group("search over the linear layer")
    searching.add_argument(
        "--tolerance", type=fraction, metavar="T", default=0.02,
        help="accuracy that may be lost, as a fraction",
    )  # fmt: skip
    searching.add_argument(
        "--holdout", action="store_true",
        help="choose the amount on one half of the images and confirm it on the other",
    )  # fmt: skip
    _add_model_search_arguments(parser.add_argument_group("search over many layers together"))
    return parser


def _add_model_search_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scope", choices=("linear", "conv", "all"),
        help="search how far these layers can be pruned together, within --tolerance; the saved "
        "model is then the sparsest one found",
    )  # fmt: skip
    group.add_argument(
        "--allocation", type=list_of(one_of(*ALLOCATIONS)), metavar="NAME,...",
        default=list(ALLOCATIONS),
        help=f"how the total is shared out among the layers: {', '.join(ALLOCATIONS)}",
    )  # fmt: skip
    group.add_argument(
        "--recalibrate-bn", action="store_true",
        help="adds rows with batch-norm statistics re-estimated on training images after pruning",
    )  # fmt: skip
    group.add_argument(
        "--finetune-epochs", type=positive_int, metavar="N",
        help="adds a row: the best of the others trained for N epochs, its zeros held, at its own "
        "sparsity and at higher ones for as long as they are within --tolerance",
    )  # fmt: skip
    group.add_argument(
        "--finetune-images", type=image_count, metavar="N|all", default="all",
        help="training images for --finetune-epochs",
    )  # fmt: skip


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, describe, scan, search, write, confirm, report."""
    args = arguments.parse_arguments(build_parser(), argv, NEEDED_FLAGS)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    # torch takes seconds to import, so nothing that needs it is imported before this line.
    from common import checkpoint, data, device, output, report, size, sources, workers
    from common.cascade import has_bf16
    from common.html_report import add_report
    from pruning import (
        artifacts,
        experiment,
        finetuning,
        model_results,
        model_search,
        plots,
        savings,
        search,
        story,
        tables,
    )

    device.set_threads(args.threads)
    place = device.choose_device(args.device)
    amounts = args.amounts or [args.amount]
    batch_size = args.batch_size or (CPU_BATCH_SIZE if place.type == "cpu" else GPU_BATCH_SIZE)
    fast = args.precision == "auto" and place.type == "cpu" and has_bf16()
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(workers.join_workers(place))
        place = crew.device
        if crew.is_first:
            folder = stack.enter_context(
                output.OutputFolder(args.output_dir, args.overwrite, keep=(JOURNAL_NAME,))
            )
        weights = checkpoint.find_weights(args.weights, Path(__file__).parent)
        cli.log.info("weights: %s", weights.found)
        model = checkpoint.load_model(weights.path)
        chosen = experiment.choose_layers(model, args.layers)
        with crew.one_a_machine_first():
            source = sources.open_source(args.data_dir, args.bundled, not args.no_bundled)
        test = data.load_images(source, "test", args.test_images, args.seed)
        cli.log.info("images: %d for testing, from %s", len(test), source.description)
        layers = size.describe_layers(model)
        model, test = model.to(place), test.to(place)
        journal_path = args.output_dir / JOURNAL_NAME
        scanned, scan_seconds = experiment.run_scan(
            model, test, chosen, amounts, journal_path, args.resume, batch_size, fast, crew
        )
        verification = None
        if args.verify:
            verification = experiment.verify(scanned, model, test, scan_seconds, crew)
        if not crew.is_first:
            savings.predict_together(None, test, batch_size, crew)
            return cli.EXIT_DONE

        results = report.common_results(
            "pruning", args, place, {"source": source.name, "test_images": len(test)}, weights
        )
        results |= experiment.scan_results(scanned, model, layers, amounts)
        results["processes"] = crew.count
        if verification is not None:
            results["verification"] = verification
        linear, correct, pruned_weights = search.search_linear(
            model, scanned.features, test.labels.cpu(), args.tolerance,
            args.seed if args.holdout else None,
        )  # fmt: skip
        plain, packed = (folder.file(n) for n in (artifacts.PRUNED_NAME, artifacts.PACKED_NAME))
        linear_pruned = savings.prune_linear(model, pruned_weights)
        sizes = savings.save_artifacts(model, linear_pruned, plain, packed)
        pruned = checkpoint.load_model(plain)
        linear["confirmed"] = savings.confirm(
            pruned, test, scanned.features, scanned.dense_correct, batch_size, crew
        )
        results["linear_search"] = linear
        results["savings"] = savings.measure_savings(sizes, results["structure"], model, test)

        if args.scope:
            search_started = time.perf_counter()
            searched = model_search.ModelSearch.prepare(
                model, args.scope, test, scanned.dense_correct, args.tolerance, args.seed, fast
            )
            if args.recalibrate_bn:
                searched.training = model_results.load_training(source, args.seed).to(place)
            found = model_results.run_all(searched, args.allocation, layers)
            if args.finetune_epochs:
                train = data.load_images(source, "train", args.finetune_images, args.seed)
                best = model_results.best_of(found)
                found.append(
                    finetuning.run_finetuned(
                        searched, best, train.to(place), args.finetune_epochs, layers
                    )
                )
            results["model_search"] = [one.entry for one in found]
            results["model_search_seconds"] = time.perf_counter() - search_started
            results["model_saved"] = model_results.save_best(searched, found, plain, packed)

        results["artifacts"] = {
            "model": artifacts.PRUNED_NAME,
            "packed": artifacts.PACKED_NAME,
            "csv": [SENSITIVITY_CSV, CURVE_CSV],
            "plots": plots.draw_all(results, correct, folder.file),
        }
        tables.write_sensitivity_csv(results["sensitivity"], folder.file(SENSITIVITY_CSV))
        tables.write_curve_csv(linear["curve"], folder.file(CURVE_CSV))
        results |= report.run_cost(started)
        if args.report:
            add_report(results, story.tell(results), folder)
        report.write_json(folder.file(output.RESULTS_NAME), results)
        folder.commit()
        journal_path.unlink(missing_ok=True)
    text = tables.format_results(results, args.output_dir)
    print(report.to_json(results) if args.json else text, end="")
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
