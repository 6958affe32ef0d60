"""Train the ResNet18 for CIFAR-10 whose weights the other scripts compress.

    python training/training.py --data-dir ~/cifar10  # the recipe of the bundled weights
    torchrun --nproc-per-node 4 training/training.py --data-dir ~/cifar10

Some training images are held out, for choices among runs; the test images are used once, at the
end. Writes resnet18_cifar10.pth, results.json with all settings, and a CSV and a plot of the
epochs. A checkpoint is written after each epoch: --resume continues an interrupted run.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command import arguments, cli
from common.command.argument_types import fraction, image_count, positive_float, positive_int
from common.command.input_arguments import add_image_arguments
from training.recipe import BUNDLED_RECIPE, Recipe


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = arguments.make_parser(__doc__)
    inputs = parser.add_argument_group("inputs")
    add_image_arguments(inputs, test_images=None)
    inputs.add_argument(
        "--train-images", type=image_count, metavar="N|all", default="all",
        help="training images, held-out ones included: a class-balanced, seeded subset, or all",
    )  # fmt: skip
    inputs.add_argument(
        "--held-out-images", type=positive_int, metavar="N", default=2500,
        help="training images that are not trained on, for choices; the same for every seed",
    )  # fmt: skip
    recipe = parser.add_argument_group("recipe (by default that of the bundled weights)")
    for field, parse, text in (
        ("epochs", positive_int, "passes over the training images"),
        ("batch_size", positive_int, "images a step, over all processes together"),
        ("learning_rate", positive_float, "peak of the schedule"),
        ("cutmix", fraction, "fraction of images partly covered by another"),
        ("jitter", fraction, "fraction of images distorted, and of images recoloured"),
    ):
        flag, default = "--" + field.replace("_", "-"), getattr(BUNDLED_RECIPE, field)
        metavar = "N" if parse is positive_int else "X"
        recipe.add_argument(flag, type=parse, metavar=metavar, default=default, help=text)
    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume", action="store_true", help="continue the unfinished run in --output-dir"
    )
    arguments.add_machine_arguments(running)
    arguments.add_output_arguments(parser, "training")
    return parser


@cli.exit_codes
def main(argv: list[str] | None = None) -> int:
    """Train, measure once on the test images, write."""
    args = arguments.parse_arguments(build_parser(), argv, {})
    started = cli.start(args.quiet)  # imports torch, so nothing that needs it is imported above
    import torch

    from common.checkpoints.checkpoint import WEIGHTS_NAME
    from common.checkpoints.resnet import ResNet, resnet18_shape
    from common.images import sources
    from common.images.data import checksum
    from common.images.loading import check_disjoint, load_images
    from common.network.size import describe_network
    from common.network.tracing import trace_network
    from common.run import common_results, finish_run, start_run
    from training import record
    from training.loop.fit import TrainingState, choose_precision, fit

    with start_run(args, shared=True) as (workers, folder):
        # On a CPU the choice is timed, and a resumed run could choose another precision.
        on_cuda = workers.device.type == "cuda"
        recipe = Recipe(
            args.epochs, args.batch_size, args.learning_rate, cutmix=args.cutmix,
            jitter=args.jitter, precision=choose_precision(workers.device) if on_cuda else "fp32",
        )  # fmt: skip
        with workers.one_a_machine_first():
            source = sources.open_chosen_source(args)
        images = load_images(
            source, "train", args.train_images, args.seed, flag="--train-images"
        ).to(workers.device)
        train, held_out = record.split_held_out(images, args.held_out_images)
        # Used at the end only, but an error in them must not cost the training.
        test = load_images(source, "test", args.test_images, args.seed, flag="--test-images")
        check_disjoint(images, test, source.description)
        cli.log.info("images: %d to train on, %d held out, from %s",
                     len(train), len(held_out), source.description)  # fmt: skip

        torch.manual_seed(args.seed)
        shape = resnet18_shape(len(train.classes))
        state = TrainingState.start(ResNet(shape), recipe, workers.device)
        identity = record.identify(recipe, args.seed, workers.count, train)
        workers.require_same(identity)
        partial = folder.keep_unfinished(identity, args.resume).folder if workers.is_first else None
        checkpoint = workers.broadcast(partial) / record.CHECKPOINT_NAME
        recorder = record.EpochRecorder(held_out, recipe.epochs, checkpoint)
        if args.resume:
            recorder.resume(state)
        workers.require_same({"the resumed state": checksum(state.tensors().values())})
        fit(state, train, recipe, args.seed, workers,
            after_epoch=recorder if workers.is_first else None)  # fmt: skip
        if not workers.is_first:
            return cli.EXIT_DONE

        model = state.model.eval()
        counts = {"train_images": len(train), "held_out_images": len(held_out)}
        counts = {"source": source.name, **counts, "test_images": len(test), **test.describe()}
        network = describe_network(shape.family, model, trace_network(model, train.shape))
        weights = record.save_weights(model, folder)
        described = {"data": counts, "weights": weights, "network": network}
        results = common_results("training", args, workers, described)
        results["recipe"] = dataclasses.asdict(recipe)
        results["parameters"] = network["parameters"]
        results |= record.describe_accuracy(model, held_out, test.to(workers.device))
        record.save_epochs(recorder.rows, folder)
        results["artifacts"] = {"model": WEIGHTS_NAME, "epochs": record.EPOCHS_NAME}
        finish_run(results, folder, started, record.tell, args)
    return cli.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
