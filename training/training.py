"""Train the ResNet18 for CIFAR-10 whose weights the other scripts compress.

    python training.py                                   # the preset for this machine
    python training.py --preset gpu --data-dir ~/cifar10
    torchrun --nproc-per-node 4 training.py --preset gpu

Some training images are held out: every choice is made on them. The test images are used once, at
the end. Writes resnet18_cifar10.pth, results.json that says how it was made, a CSV and a plot of
the epochs. A checkpoint is written after each epoch: a run that was killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import arguments, cli
from common.argument_types import (
    fraction,
    image_count,
    non_negative_int,
    positive_float,
    positive_int,
)
from common.cifar10 import IMAGE_SIZE
from training.recipe import PRESETS, SIZE_STEP, Recipe

DEFAULT_OUTPUT_DIR = cli.REPOSITORY / "results" / "training"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(
        __doc__,
        epilog=_describe_presets() + "\n\nexamples:\n"
        "  python training.py --preset gpu --data-dir ~/cifar10\n"
        "  torchrun --nproc-per-node 4 training.py --preset gpu",
    )
    inputs = parser.add_argument_group("inputs")
    arguments.add_image_arguments(inputs, test_images=None)
    inputs.add_argument(
        "--train-images",
        type=image_count,
        metavar="N|all",
        default="all",
        help="training images, held-out ones included: a class-balanced, seeded subset, or all",
    )
    inputs.add_argument(
        "--held-out-images",
        type=positive_int,
        metavar="N",
        default=2500,
        help="training images that are not trained on, for choices; the same for every seed",
    )
    _add_recipe_arguments(parser.add_argument_group("recipe (by default the preset's)"))
    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run in --output-dir"
    )
    running.add_argument(
        "--checkpoint-every",
        type=positive_int,
        metavar="N",
        default=1,
        help="epochs between checkpoints, each of 134 MB",
    )
    arguments.add_machine_arguments(running)
    arguments.add_output_arguments(parser.add_argument_group("outputs"), DEFAULT_OUTPUT_DIR)
    return parser


def _add_recipe_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset",
        choices=("auto", *PRESETS),
        default="auto",
        help="auto takes gpu where there is one, else cpu",
    )
    for flag, parse, text in (
        ("--epochs", positive_int, "passes over the training images"),
        ("--batch-size", positive_int, "images a step, over all processes together"),
        ("--learning-rate", positive_float, "peak of the schedule"),
        ("--warmup", fraction, "fraction of the steps in which the learning rate rises"),
        ("--weight-decay", fraction, "of weights; biases and batch-norm have none"),
        ("--label-smoothing", fraction, "probability spread over all classes"),
        ("--cutout", non_negative_int, "side of the hidden square in pixels; 0: none"),
        ("--cutmix", fraction, "fraction of images partly covered by another"),
        ("--jitter", fraction, "fraction of images bent, and of images recoloured"),
        ("--start-size", image_size, "side of the first epochs' images in pixels"),
        ("--full-size-from", fraction, "fraction of the epochs before the full size"),
        ("--ema-decay", fraction, "of the weights' moving average, a step"),
    ):
        group.add_argument(flag, type=parse, metavar="N" if "int" in str(parse) else "X", help=text)
    group.add_argument(
        "--schedule", choices=("cosine", "one-cycle"), help="of the learning rate after its rise"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of convolutions; auto takes what the device is fast in",
    )
    group.add_argument(
        "--compile", action="store_true", default=None, help="compile with torch.compile"
    )


def image_size(text: str) -> int:
    """Parse the side of shrunk images: a multiple of 4 from 8 to 32 pixels."""
    if (value := positive_int(text)) not in range(2 * SIZE_STEP, IMAGE_SIZE + 1, SIZE_STEP):
        raise argparse.ArgumentTypeError(f"{text!r} is not 8, 12, 16, 20, 24, 28 or 32")
    return value


def _describe_presets() -> str:
    lines = ["presets:"]
    for name, recipe in PRESETS.items():
        lines.append(
            f"  {name}: {recipe.epochs} epochs, batch {recipe.batch_size}, learning rate "
            f"{recipe.learning_rate} ({recipe.schedule}), cutmix {recipe.cutmix},\n"
            f"       jitter {recipe.jitter}, images from {recipe.start_size} to {IMAGE_SIZE} pixels"
        )
    return "\n".join(lines)


def choose_recipe(preset: str, given: dict, device_type: str) -> Recipe:
    """Return the preset's recipe, with what was given on the command line in its place."""
    if preset == "auto":
        preset = "gpu" if device_type == "cuda" else "cpu"
    fields = {field.name for field in dataclasses.fields(Recipe)}
    changes = {name: value for name, value in given.items() if name in fields and value is not None}
    return dataclasses.replace(PRESETS[preset], **changes)


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Train, choose on held-out images, measure once on the test images, write."""
    args = build_parser().parse_args(argv)
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    # torch takes seconds to import, so nothing that needs it is imported before this line.
    import torch

    from common import data, device, report, sources
    from common.model import ResNet18
    from common.run import finish_run, print_results, start_run
    from common.size import count_parameters
    from training import experiment, journal, precision, tables
    from training.state import TrainingState

    device.set_threads(args.threads)
    place = device.choose_device(args.device)
    recipe = choose_recipe(args.preset, vars(args), place.type)
    if recipe.precision == "auto":
        recipe = dataclasses.replace(recipe, precision=precision.choose_precision(place))
    with start_run(place, args.output_dir, args.overwrite) as (crew, folder):
        with crew.one_a_machine_first():
            source = sources.open_source(args.data_dir, args.bundled, not args.no_bundled)
        images = data.load_images(source, "train", args.train_images, args.seed).to(crew.device)
        train, held_out = experiment.split_held_out(images, args.held_out_images)
        # Not used before the end, but what is amiss with them must not cost the training.
        test = data.load_images(source, "test", args.test_images, args.seed)
        cli.log.info("images: %d to train on, %d held out, from %s",
                     len(train), len(held_out), source.description)  # fmt: skip

        torch.manual_seed(args.seed)
        state = TrainingState.start(ResNet18(), recipe, crew.device)
        settings = journal.describe_settings(recipe, args.seed, train)
        crew.require_same(settings)
        notes = experiment.open_journal(
            args.output_dir, settings, state, args.resume, args.overwrite, crew
        )
        meter = experiment.EpochMeter(
            train, held_out, recipe, args.seed, notes, args.checkpoint_every
        )
        experiment.train_on(train, state, recipe, args.seed, crew, meter)
        if not crew.is_first:
            return cli.EXIT_DONE

        model, choice = experiment.choose(state, train, held_out, recipe, args.seed)
        weights = experiment.save_weights(model, folder)
        described = {"source": source.name, "train_images": len(train),
                     "held_out_images": len(held_out), "test_images": len(test)}  # fmt: skip
        results = report.common_results("training", args, crew, described, weights)
        results |= {"recipe": dataclasses.asdict(recipe), "parameters": count_parameters(model)}
        results |= choice | experiment.measure_test(model, test.to(crew.device))
        results["artifacts"] = experiment.save_epochs(notes.rows, folder)
        finish_run(results, folder, started)
        notes.remove()
    print_results(results, tables.format_results(results, args.output_dir), args.json)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
