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
        "  python pruning.py --amounts 0.5,0.7,0.9 --layers 'layer4.*,linear'\n\n"
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
    """Load, scan, search, write, confirm, report."""
    args = arguments.parse_arguments(build_parser(), argv, NEEDED_FLAGS)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    # torch takes seconds to import, so nothing that needs it is imported before this line.
    from common import cascade, device, report
    from common.inputs import load_inputs
    from common.run import finish_run, print_results, start_run
    from pruning import chapters, experiment, model_search, savings, story, tables

    device.set_threads(args.threads)
    place = device.choose_device(args.device)
    amounts = args.amounts or [args.amount]
    batch_size = args.batch_size or (CPU_BATCH_SIZE if place.type == "cpu" else GPU_BATCH_SIZE)
    fast = args.precision == "auto" and place.type == "cpu" and cascade.has_bf16()
    journal_path = args.output_dir / JOURNAL_NAME
    with start_run(place, args.output_dir, args.overwrite, (JOURNAL_NAME,)) as (crew, folder):
        inputs = load_inputs(
            **arguments.input_choices(args), script_dir=Path(__file__).parent, workers=crew
        ).to(crew.device)
        model, test = inputs.model, inputs.test
        layers = experiment.choose_layers(model, args.layers)
        training = chapters.Training.read(
            inputs, args.recalibrate_bn, args.finetune_epochs, args.finetune_images
        )
        scanned, scan_seconds = experiment.run_scan(
            model, test, layers, amounts, journal_path, args.resume, batch_size, fast, crew
        )
        verification = None
        if args.verify:
            verification = experiment.verify(scanned, model, test, scan_seconds, crew)
        if not crew.is_first:
            savings.predict_together(None, test, batch_size, crew)  # what the first will confirm
            return cli.EXIT_DONE

        results = report.common_results(
            "pruning", args, crew, inputs.describe_images(), inputs.weights
        )
        account = chapters.Account(results, folder, inputs, scanned)
        chapters.add_scan(account, amounts, verification)
        chapters.add_linear_search(
            account, args.tolerance, args.seed if args.holdout else None, batch_size, crew
        )
        if args.scope:
            searched = model_search.ModelSearch.prepare(
                model, args.scope, test, scanned.dense_correct, args.tolerance, args.seed, fast
            )
            chapters.add_model_search(account, searched, args.allocation, training)
        chapters.add_files(account)
        finish_run(results, folder, started, story.tell if args.report else None)
        journal_path.unlink(missing_ok=True)
    print_results(results, tables.format_results(results, args.output_dir), args.json)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
