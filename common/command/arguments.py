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
    batch_size,
    image_count,
    list_of,
    path,
    positive_float,
    positive_int,
    seed_int,
    thread_count,
)
from common.command.cli import REPOSITORY


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
    return args


def add_shared_arguments(
    parser: argparse.ArgumentParser,
    output_dir: Path,
    with_report: bool = True,
    with_device: bool = True,
) -> None:
    """Add the flags of the scripts that compress a checkpoint.

    Args:
        parser: Changed in place.
        output_dir: The script's default for ``--output-dir``.
        with_report: The script can write report.html.
        with_device: The script can run elsewhere than on the CPU.
    """
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--weights",
        type=path,
        metavar="FILE",
        help="checkpoint; by default resnet18_cifar10.pth in the working directory, beside the "
        "script or in the repository root, else the bundled weights",
    )
    add_image_arguments(inputs, test_images=2000)
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size", type=batch_size, metavar="N", default=64, help="images evaluated at once"
    )
    add_machine_arguments(running, with_device)
    outputs = parser.add_argument_group("outputs")
    add_output_arguments(outputs, output_dir)
    if with_report:
        outputs.add_argument(
            "--report",
            action="store_true",
            help="write report.html too: the run on one page, plots and all in a single file",
        )


def add_image_arguments(inputs: argparse._ArgumentGroup, test_images: int | None) -> None:
    """Add the flags that say where images come from; ``test_images`` is the default, None all."""
    inputs.add_argument(
        "--data-dir",
        type=path,
        metavar="DIR",
        default=REPOSITORY / "data",
        help="folder with cifar-10-batches-py/ (downloaded there when missing) or with image "
        "folders train/<class>/* and test/<class>/*",
    )
    fallback = inputs.add_mutually_exclusive_group()
    fallback.add_argument(
        "--bundled", action="store_true", help="use the bundled images; touch no network"
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
        default=test_images or "all",
        help="test images to measure accuracy on: a class-balanced, seeded subset, or all",
    )


def add_calibration_argument(
    quantizing: argparse._ActionsContainer,
    default: int = 512,
    purpose: str = "that set the activations' ranges",
) -> None:
    """Add the flag that says on how many training images INT8 is calibrated, or more is done."""
    quantizing.add_argument(
        "--calibration-images",
        type=positive_int,
        metavar="N",
        default=default,
        help=f"training images {purpose}: class-balanced, seeded",
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
        help="CPU threads; by default what torch chooses, one a physical core",
    )
    running.add_argument(
        "--seed", type=seed_int, metavar="N", default=0, help="of every random choice"
    )


def add_output_arguments(outputs: argparse._ArgumentGroup, output_dir: Path) -> None:
    """Add the flags that say where results go; ``output_dir`` is the script's default."""
    outputs.add_argument(
        "--output-dir", type=path, metavar="DIR", default=output_dir, help="where results go"
    )
    outputs.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of an earlier run; by default they are moved to earlier/",
    )
    outputs.add_argument(
        "--json", action="store_true", help="print results.json to stdout, and nothing else"
    )
    outputs.add_argument("--quiet", action="store_true", help="no progress and no notes")
