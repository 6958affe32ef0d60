"""Find out which layers of an image classifier can lose their weights, and how many.

    python pruning/pruning.py                               # each layer alone; the linear layers
    python pruning/pruning.py --weights my.pth --data-dir ~/cifar10 --amounts 0.5,0.7,0.9
    python pruning/pruning.py --scope all --recalibrate-bn  # how far can the whole network go?

Describes the structure. Prunes each layer alone (L1, unstructured) and measures the accuracy on the
same images. Searches how far the linear layers can be pruned within a tolerance, and checks the
answer against every amount. With --scope, searches how far all layers can be pruned together.
Writes the pruned model, results.json and plots.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import argument_types as types
from common.command import arguments, cli

CPU_BATCH_SIZE, GPU_BATCH_SIZE = 16, 256
NEEDED_FLAGS = {
    "--recalibrate-bn": "--scope",
    "--finetune-epochs": "--scope",
    "--finetune-images": "--finetune-epochs",
}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(
        __doc__,
        epilog="examples:\n"
        "  python pruning/pruning.py\n"
        "  python pruning/pruning.py --amounts 0.5,0.7,0.9 --layers 'layer4.*,linear'\n\n"
        f"A batch is {CPU_BATCH_SIZE} images on a CPU, where the activations of all variants then\n"
        f"stay in the cache, and {GPU_BATCH_SIZE} on a GPU, unless --batch-size says otherwise.",
    )
    scanning = parser.add_argument_group("sensitivity scan")
    scanning.add_argument(
        "--amounts", type=types.list_of(types.fraction), metavar="A,...", default=[0.9],
        help="fractions of each layer's weights to prune; several add a plot of all of them",
    )  # fmt: skip
    scanning.add_argument(
        "--layers", type=types.list_of(types.name), metavar="NAME,...",
        help="layers to prune, by name or pattern (layer4.*); all by default",
    )  # fmt: skip
    scanning.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="arithmetic of the scan; bf16: decides close cases again in FP32; auto: bf16 on CPUs "
        "where it is faster",
    )  # fmt: skip
    scanning.add_argument(
        "--resume", action="store_true",
        help="continue a scan that was stopped, if checkpoint, images and settings are the same",
    )  # fmt: skip
    scanning.add_argument(
        "--verify", action="store_true",
        help="repeat scan and search by brute force (slow); fail if more than 1 in 1,000 "
        "predictions differ",
    )  # fmt: skip
    parser.add_argument_group("search over the linear layers").add_argument(
        "--tolerance", type=types.accuracy_loss, metavar="T", default=0.02,
        help="accuracy that may be lost, as a fraction: 0.01 is one point",
    )  # fmt: skip
    together = parser.add_argument_group("search over many layers together")
    together.add_argument(
        "--scope", choices=("linear", "conv", "all"),
        help="search how far these layers can be pruned together within --tolerance, and save the "
        "sparsest network found",
    )  # fmt: skip
    together.add_argument(
        "--recalibrate-bn", action="store_true",
        help="add a row: batch-norm statistics re-estimated on training images after pruning",
    )  # fmt: skip
    arguments.add_finetuning_arguments(
        together,
        "add a row: the best network found, trained for N epochs with its zeros kept, then at "
        "higher sparsities for as long as it stays within --tolerance",
    )
    arguments.add_shared_arguments(parser, "pruning")
    parser.set_defaults(batch_size=None)
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Load, scan, search, write, confirm, report."""
    args = arguments.parse_arguments(build_parser(), argv, NEEDED_FLAGS)
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    from common.inputs import load_inputs
    from common.machine.device import bf16_pays
    from common.network.tracing import weight_layers
    from common.run import common_results, finish_run, start_run
    from common.search.budget import why_too_strict
    from pruning import steps
    from pruning.alone.brute_force import verify
    from pruning.alone.scan import Scan, choose_layers, run_scan
    from pruning.report import plots, story
    from pruning.report.results import describe_scan
    from pruning.together.recalibration import adopt_statistics
    from pruning.together.search import ModelSearch
    from training.loop.distillation import Training

    with start_run(args, shared=True) as (workers, folder):
        on_cpu = workers.device.type == "cpu"
        batch_size = args.batch_size or (CPU_BATCH_SIZE if on_cpu else GPU_BATCH_SIZE)
        inputs = load_inputs(args, Path(__file__).parent, workers).to(workers.device)
        fast = args.precision == "bf16" or (args.precision == "auto" and bf16_pays())
        fast = workers.broadcast(fast and on_cpu)  # timings differ: the first worker decides
        names = list(weight_layers(inputs.model, inputs.traced.network))
        layers = choose_layers(names, args.layers, inputs.own_names)
        if args.scope and (reason := why_too_strict(len(inputs.test), args.tolerance)):
            raise cli.UserError(f"--scope: {reason}")
        calibration = steps.read_calibration(inputs) if args.recalibrate_bn else None
        training = Training.read(inputs, args.finetune_epochs, args.finetune_images, workers.device)
        scan = Scan(inputs.model, inputs.test, layers, args.amounts, batch_size, fast, workers)
        scanned, scan_seconds = run_scan(scan, folder, args.resume)
        verification = verify(scan, scanned, args.tolerance) if args.verify else None
        if not workers.is_first:  # the first one does the rest alone
            return cli.EXIT_DONE

        results = common_results("pruning", args, workers, inputs.describe())
        results |= describe_scan(scan, scanned)
        model_path = linear_path = folder.file(f"{inputs.file_stem}_pruned.pth")
        if args.scope:  # the search over many layers then writes the first file
            linear_path = folder.file(f"{inputs.file_stem}_pruned_linear.pth")
        if scan.head is not None:
            results |= steps.prune_linear(scan, scanned, args.tolerance, args.seed, linear_path)
        if verification is not None:
            searched = results["linear_search"]["seconds"] if scan.head else 0.0
            seconds = scan_seconds and scan_seconds + searched
            speedup = seconds and verification["brute_force_seconds"] / seconds
            results["verification"] = verification | {"seconds": seconds, "speedup": speedup}
        if args.scope:
            if learned_from := calibration or (training and training.images):
                adopt_statistics(inputs.model, learned_from)
            search = ModelSearch(
                scan, scanned.dense_correct, args.scope, args.tolerance, args.seed, calibration
            )
            results |= steps.prune_together(search, training, model_path)
        story.write_csv_files(results, folder.file)
        plots.draw_all(results, folder.file)
        results["artifacts"] = {
            **({"model": model_path.name} if args.scope or scan.head else {}),
            **({"linear_model": linear_path.name} if args.scope and scan.head else {}),
        }
        finish_run(results, folder, started, story.tell, args)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
