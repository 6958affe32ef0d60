"""Train the ResNet18 for CIFAR-10 whose weights the other scripts compress.

    python training.py --data-dir ~/cifar10                  # the recipe of the bundled weights
    torchrun --nproc-per-node 4 training.py --data-dir ~/cifar10

Some training images are held out, for choices among runs; the test images are used once, at the
end. Writes resnet18_cifar10.pth, results.json that says how it was made, a CSV and a plot of the
epochs. A checkpoint is written after each epoch: a run that was killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from common.command.argument_types import fraction, image_count, positive_float, positive_int
from training.recipe import BUNDLED_RECIPE, Recipe

DEFAULT_OUTPUT_DIR = cli.WORKSPACE / "results" / "training"


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
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
    _add_recipe_arguments(
        parser.add_argument_group("recipe (by default that of the bundled weights)")
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run in --output-dir"
    )
    arguments.add_machine_arguments(running)
    arguments.add_output_arguments(parser.add_argument_group("outputs"), DEFAULT_OUTPUT_DIR)
    return parser


def _add_recipe_arguments(group: argparse._ArgumentGroup) -> None:
    for field, parse, text in (
        ("epochs", positive_int, "passes over the training images"),
        ("batch_size", positive_int, "images a step, over all processes together"),
        ("learning_rate", positive_float, "peak of the schedule"),
        ("cutmix", fraction, "fraction of images partly covered by another"),
        ("jitter", fraction, "fraction of images bent, and of images recoloured"),
    ):
        flag, default = "--" + field.replace("_", "-"), getattr(BUNDLED_RECIPE, field)
        metavar = "N" if parse is positive_int else "X"
        group.add_argument(flag, type=parse, metavar=metavar, default=default, help=text)


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Train, measure once on the test images, write."""
    args = arguments.parse_arguments(build_parser(), argv, {})
    cli.set_up_messages(args.quiet)
    started = time.perf_counter()

    cli.import_torch()  # it takes seconds, so nothing that needs it is imported above
    import torch

    from common.images import data, sources
    from common.machine import device
    from common.network.resnet import ResNet, resnet18_shape
    from common.report.results import common_results
    from common.run import finish_run, print_results, start_run
    from training.loop.fit import choose_precision, fit
    from training.loop.state import TrainingState
    from training.record import epochs, measure, report

    device.set_up_cpu(args.threads)
    place = device.choose_device(args.device)
    # On a CPU the choice is timed, and a run that is resumed could come to another.
    precision = choose_precision(place) if place.type == "cuda" else "fp32"
    recipe = Recipe(
        args.epochs, args.batch_size, args.learning_rate, cutmix=args.cutmix, jitter=args.jitter,
        precision=precision,
    )  # fmt: skip
    with start_run(place, args.output_dir, args.overwrite) as (crew, folder):
        with crew.one_a_machine_first():
            source = sources.open_chosen_source(args)
        images = data.load_images(
            source, "train", args.train_images, args.seed, flag="--train-images"
        ).to(crew.device)
        train, held_out = measure.split_held_out(images, args.held_out_images)
        # Not used before the end, but what is amiss with them must not cost the training.
        test = data.load_images(source, "test", args.test_images, args.seed, flag="--test-images")
        data.check_disjoint(images, test, source.description)
        cli.log.info("images: %d to train on, %d held out, from %s",
                     len(train), len(held_out), source.description)  # fmt: skip

        torch.manual_seed(args.seed)
        state = TrainingState.start(ResNet(resnet18_shape(len(train.classes))), recipe, crew.device)
        identity = epochs.identify(recipe, args.seed, crew.count, train)
        crew.require_same(identity)
        kept = folder.keep_unfinished(identity, args.resume).folder if crew.is_first else None
        recorder = epochs.EpochRecorder(
            held_out, recipe.epochs, crew.broadcast(kept) / epochs.CHECKPOINT_NAME
        )
        if args.resume:
            recorder.resume(state)
        crew.require_same({"what they resume from": data.checksum(state.tensors().values())})
        fit(state, train, recipe, args.seed, crew, after_epoch=recorder if crew.is_first else None)
        if not crew.is_first:
            return cli.EXIT_DONE

        weights = save_weights(state.model, folder)
        described = {"source": source.name, "train_images": len(train),
                     "held_out_images": len(held_out), "test_images": len(test),
                     **test.describe()}  # fmt: skip
        results = common_results("training", args, crew, described, weights)
        results["recipe"] = dataclasses.asdict(recipe)
        results["parameters"] = sum(p.numel() for p in state.model.parameters())
        results |= measure.describe_accuracy(state.model.eval(), held_out, test.to(crew.device))
        results["artifacts"] = report.save_epochs(recorder.rows, folder)
        told = finish_run(results, folder, started, report.tell, args.report)
    print_results(results, told, args.output_dir, args.json)
    return cli.EXIT_DONE


def save_weights(model, folder) -> dict:
    """Write the weights in the course's layout, a plain FP32 state dict; return ``weights``."""
    from common.network.checkpoint import WEIGHTS_NAME, WeightsFile, save_checkpoint

    file = WeightsFile(folder.file(WEIGHTS_NAME), "this run")
    state = model.state_dict()
    save_checkpoint({name: value.cpu().contiguous() for name, value in state.items()}, file.path)
    return file.describe()


if __name__ == "__main__":
    sys.exit(main())
