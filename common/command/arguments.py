"""The flags that scripts share, so that they are named, checked and explained alike.

Nothing here imports torch, so that ``--help`` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Mapping
from pathlib import Path

from common.command.argument_types import (
    AtMost,
    batch_size,
    channels,
    image_count,
    integer,
    list_of,
    name,
    number,
    path,
    positive_float,
    positive_int,
    seed_int,
    thread_count,
)
from common.command.cli import WORKSPACE
from common.images.normalisation import AUTO, NORMALISATIONS

DEFAULT_DATA_DIR = WORKSPACE / "data"
TEST_IMAGES, CALIBRATION_IMAGES = 2000, 512


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults where there are any, and keep the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _expand_help(self, action: argparse.Action) -> str:
        if isinstance(action.default, list):  # as it would be typed
            action = copy.copy(action)
            action.default = ",".join(map(str, action.default))
        return super()._expand_help(action)


def make_parser(script_doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser without flags.

    Args:
        script_doc: The script's docstring, of which the first paragraph introduces ``--help``; None
            under ``python -OO``.
        epilog: What ends it; by default the docstring's indented lines, which are examples.
    """
    if epilog is None and script_doc:
        lines = [line for line in script_doc.splitlines() if line.startswith("    ")]
        epilog = "\n".join(["examples:", *(f"  {line.split(' #')[0].strip()}" for line in lines)])
    return argparse.ArgumentParser(
        usage="%(prog)s [flags]",  # argparse would list them all, above every error
        # The formatter keeps lines as they are, and those of a docstring may be longer than 80.
        description=textwrap.fill((script_doc or "").split("\n\n")[0], width=80),
        epilog=epilog,
        formatter_class=HelpFormatter,
    )


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None, needed: Mapping[str, str]
) -> argparse.Namespace:
    """Parse the command line; a flag that would do nothing for want of another is wrong usage.

    Args:
        parser: Of the script.
        argv: The command line; None for the process's own.
        needed: For some flags the flag without which they have no effect.
    """
    args, defaults = parser.parse_args(argv), parser.parse_args([])

    def is_given(flag: str) -> bool:
        name = flag.removeprefix("--").replace("-", "_")
        return getattr(args, name) != getattr(defaults, name)

    for flag, other in needed.items():
        if is_given(flag) and not is_given(other):
            parser.error(f"argument {flag}: does nothing without {other}")
    if "image_size" in args and args.resize is not None:
        if args.image_size is None:
            parser.error("argument --resize: does nothing without --image-size")
        if args.resize < args.image_size:
            parser.error("argument --resize: smaller than --image-size")
    return args


def add_shared_arguments(
    parser: argparse.ArgumentParser,
    output_dir: Path,
    with_device: bool = True,
) -> None:
    """Add the flags of the scripts that compress a checkpoint.

    Args:
        parser: Changed in place.
        output_dir: The script's default for ``--output-dir``.
        with_device: The script can run elsewhere than on the CPU.
    """
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--weights",
        type=path,
        metavar="FILE",
        help="checkpoint, or FILE:KEY for one of the state dicts in it; by default "
        "resnet18_cifar10.pth in the working directory, beside the script or in the repository "
        "root, else the bundled weights",
    )
    inputs.add_argument(
        "--model",
        type=name,
        metavar="NAME",
        help="network that --weights belongs to: torchvision:NAME, such as torchvision:vgg11_bn, "
        "or FILE.py:FUNCTION, a function of your own without arguments that returns it, which is "
        "run; by default a ResNet, recognised from the checkpoint",
    )
    inputs.add_argument(
        "--max-pool",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether a max pool follows a ResNet's first convolution; auto: after one of 7×7 "
        "pixels only",
    )
    add_image_arguments(inputs, test_images=TEST_IMAGES, with_auto=True)
    inputs.add_argument(
        "--channel-order",
        choices=("rgb", "bgr"),
        default="rgb",
        help="bgr for networks trained on images as OpenCV reads them",
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size",
        type=batch_size,
        metavar="N",
        default=AtMost(64),
        help="images to evaluate at once; the default is smaller where the network's values are "
        "large",
    )
    add_machine_arguments(running, with_device)
    add_output_arguments(parser.add_argument_group("outputs"), output_dir)


def add_image_arguments(
    inputs: argparse._ArgumentGroup, test_images: int | None, with_auto: bool = False
) -> None:
    """Add the flags that say where images come from, and how they are prepared.

    Args:
        inputs: Changed in place.
        test_images: Default number of test images; None for all.
        with_auto: The normalisation can be chosen by a network that is there already.
    """
    inputs.add_argument(
        "--data-dir",
        type=path,
        metavar="DIR",
        default=DEFAULT_DATA_DIR,
        help="folder with cifar-10-batches-py/ (downloaded there when it is empty), with "
        "cifar-100-python/, or with image folders train/<class>/* and test/<class>/* (or val)",
    )
    fallback = inputs.add_mutually_exclusive_group()
    fallback.add_argument(
        "--bundled", action="store_true", help="use the bundled images; download nothing"
    )
    fallback.add_argument(
        "--no-bundled",
        action="store_true",
        help="fail when CIFAR-10 cannot be had, rather than use the bundled images",
    )
    inputs.add_argument(
        "--test-images",
        type=image_count,
        metavar="N|all",
        default=AtMost(test_images) if test_images else "all",
        help="test images to measure accuracy on: a seeded subset in the proportions of the "
        "classes, or all",
    )
    inputs.add_argument(
        "--image-size",
        type=integer(1, 1024, "a number of pixels from 1 to 1024"),
        metavar="N",
        help="cut the middle N×N pixels out of each image, whose short side is scaled to N first; "
        "by default images keep their size, those of different sizes become 224×224",
    )
    inputs.add_argument(
        "--resize",
        type=integer(1, 2048, "a number of pixels from 1 to 2048"),
        metavar="M",
        help="scale the short side to M instead, as 256 for --image-size 224",
    )
    choices = [*NORMALISATIONS, *([AUTO] if with_auto else [])]
    inputs.add_argument(
        "--normalize",
        choices=choices,
        metavar="NAME",
        help="mean and std of the channels that the network was trained with: "
        + ", ".join(choices)
        + ("; auto: those that fit its batch norms best" if with_auto else "")
        + " (default: cifar10 for images of 32×32 pixels, imagenet for larger ones)",
    )
    for flag, what, parse in (
        ("--mean", "mean", number(0, 1, "a mean from 0 to 1")),
        ("--std", "standard deviation", number(1e-3, 1, "a standard deviation from 0.001 to 1")),
    ):
        inputs.add_argument(
            flag,
            type=channels(parse),
            metavar="R,G,B",
            help=f"{what} of the channels, for pixels from 0 to 1",
        )


def add_calibration_argument(
    quantizing: argparse._ActionsContainer,
    default: int = CALIBRATION_IMAGES,
    purpose: str = "that set the activations' ranges",
) -> None:
    """Add the flag that says on how many training images INT8 is calibrated, or more is done."""
    quantizing.add_argument(
        "--calibration-images",
        type=positive_int,
        metavar="N",
        default=AtMost(default),
        help=f"training images {purpose}: seeded, in the proportions of the classes",
    )


def add_check_argument(group: argparse._ActionsContainer) -> None:
    """Add the flag that writes what a device checks its copy of a model with."""
    group.add_argument(
        "--write-check",
        action="store_true",
        help="write a few test images and their logits beside each INT8 file, for "
        "runtime/decode.py --check on the device",
    )


def add_timing_arguments(
    parser: argparse.ArgumentParser, batch_sizes: list[int], seconds: float
) -> None:
    """Add the flags that say what is timed, and for how long; the rest are their defaults."""
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--batch-sizes",
        type=list_of(batch_size),
        metavar="N,...",
        default=batch_sizes,
        help="batch sizes to time",
    )
    timing.add_argument(
        "--timing-seconds",
        type=positive_float,
        metavar="S",
        default=seconds,
        help="time to spend on each batch size",
    )


def add_machine_arguments(running: argparse._ArgumentGroup, with_device: bool = True) -> None:
    """Add the flags that say where a script runs."""
    if with_device:
        running.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
            help="where FP32 work runs; auto takes a GPU where there is one",
        )
    running.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads; by default one for each physical core, as torch chooses",
    )
    running.add_argument(
        "--seed", type=seed_int, metavar="N", default=0, help="seed of every random choice"
    )


def add_output_arguments(outputs: argparse._ArgumentGroup, output_dir: Path) -> None:
    """Add the flags that say where results go; ``output_dir`` is the script's default."""
    outputs.add_argument(
        "--output-dir", type=path, metavar="DIR", default=output_dir, help="where results go"
    )
    outputs.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the results of an earlier run in that folder; by default they are kept, in "
        "earlier/DATE_TIME/",
    )
    outputs.add_argument(
        "--report",
        action="store_true",
        help="write report.html too: the run on one page, plots and all in a single file",
    )
    outputs.add_argument(
        "--json", action="store_true", help="print results.json to stdout, and nothing else"
    )
    outputs.add_argument("--quiet", action="store_true", help="no progress and no notes")
