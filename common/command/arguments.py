"""The flags that scripts share, so that they are named, checked and explained alike.

Nothing here imports torch, so that ``--help`` and a wrong flag answer at once.
"""

import argparse
import copy
import difflib
import textwrap
from collections.abc import Mapping

from common.command import argument_types as types
from common.command.argument_types import AtMost
from common.command.cli import WORKSPACE
from common.command.input_arguments import add_network_arguments
from common.images.normalisation import AUTO

CALIBRATION_IMAGES = 512


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

    The first paragraph of the script's docstring (None under ``python -OO``) introduces ``--help``.
    ``epilog`` ends it; by default the docstring's indented lines, the examples.
    """
    if epilog is None and script_doc:
        lines = [line for line in script_doc.splitlines() if line.startswith("    ")]
        epilog = "\n".join(["examples:", *(f"  {line.split(' #')[0].strip()}" for line in lines)])
    return argparse.ArgumentParser(
        usage="%(prog)s [flags]",  # argparse would list all flags above every error
        # The formatter keeps lines as they are, and those of a docstring may be longer than 80.
        description=textwrap.fill((script_doc or "").split("\n\n")[0], width=80),
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None, needed: Mapping[str, str]
) -> argparse.Namespace:
    """Parse the command line; refuse a flag that has no effect beside or without another one.

    ``needed`` maps such flags to the flags that they need.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.8)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    chosen, defaults = vars(args), vars(parser.parse_args([]))

    def is_given(flag: str) -> bool:
        name = flag.removeprefix("--").replace("-", "_")
        return name in chosen and chosen[name] != defaults[name]

    for flag, other in {"--resize": "--image-size", **needed}.items():
        if is_given(flag) and not is_given(other):
            parser.error(f"argument {flag}: does nothing without {other}")
    for flag, other, idle in (
        ("--max-pool", "--model", is_given("--model")),
        ("--data-dir", "--bundled", args.bundled),
        ("--mean", "--normalize auto", args.normalize == AUTO),
        ("--std", "--normalize auto", args.normalize == AUTO),
    ):
        if idle and is_given(flag):
            parser.error(f"argument {flag}: does nothing with {other}")
    if is_given("--resize") and args.resize < args.image_size:
        parser.error("argument --resize: smaller than --image-size")
    return args


def add_shared_arguments(
    parser: argparse.ArgumentParser, script: str, with_device: bool = True
) -> None:
    """Add the flags of the scripts that compress a checkpoint."""
    add_network_arguments(parser.add_argument_group("inputs"))
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size", type=types.batch_size, metavar="N", default=AtMost(64),
        help="images to evaluate at once; the default is smaller where the network's values are "
        "large",
    )  # fmt: skip
    add_machine_arguments(running, with_device)
    add_output_arguments(parser, script)


def add_calibration_argument(
    group: argparse._ActionsContainer, default: int = CALIBRATION_IMAGES,
    purpose: str = "that set the activations' ranges",
) -> None:  # fmt: skip
    """Add the flag for the number of training images; ``purpose`` says what they are for."""
    group.add_argument(
        "--calibration-images", type=types.positive_int, metavar="N", default=AtMost(default),
        help=f"training images {purpose}: seeded, in the proportions of the classes",
    )  # fmt: skip


def add_finetuning_arguments(group: argparse._ActionsContainer, purpose: str) -> None:
    """Add the flags that train what a search finds; the first one's help is its ``purpose``."""
    group.add_argument("--finetune-epochs", type=types.positive_int, metavar="N", help=purpose)
    group.add_argument(
        "--finetune-images", type=types.image_count, metavar="N|all", default="all",
        help="training images for --finetune-epochs",
    )  # fmt: skip


def add_check_argument(group: argparse._ActionsContainer) -> None:
    """Add the flag that writes images and logits to check a model with on another device."""
    group.add_argument(
        "--write-check", action="store_true",
        help="write a few test images and their logits beside each INT8 file, for "
        "runtime/decode.py --check on the device",
    )  # fmt: skip


def add_timing_arguments(
    parser: argparse.ArgumentParser, batch_sizes: list[int], seconds: float
) -> None:
    """Add the flags that say which batch sizes are timed, and for how long; both with defaults."""
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--batch-sizes", type=types.list_of(types.batch_size), metavar="N,...", default=batch_sizes,
        help="batch sizes to time",
    )  # fmt: skip
    timing.add_argument(
        "--timing-seconds", type=types.positive_float, metavar="S", default=seconds,
        help="time to spend on each batch size",
    )  # fmt: skip


def add_machine_arguments(running: argparse._ArgumentGroup, with_device: bool = True) -> None:
    """Add the flags that say where a script runs."""
    if with_device:
        running.add_argument(
            "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
            help="where FP32 work runs; auto takes a GPU where there is one",
        )  # fmt: skip
    running.add_argument(
        "--threads", type=types.thread_count, metavar="N",
        help="CPU threads; by default one for each physical core, as torch chooses",
    )  # fmt: skip
    running.add_argument(
        "--seed", type=types.seed_int, metavar="N", default=0, help="seed of every random choice"
    )


def add_output_arguments(parser: argparse.ArgumentParser, script: str) -> None:
    """Add the flags that say where results go: by default to a folder of the script's name."""
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument(
        "--output-dir", type=types.path, metavar="DIR", default=WORKSPACE / "results" / script,
        help="where results go",
    )  # fmt: skip
    outputs.add_argument(
        "--overwrite", action="store_true",
        help="delete the results of an earlier run in that folder; by default they are kept, in "
        "earlier/DATE_TIME/",
    )  # fmt: skip
    outputs.add_argument(
        "--report", action="store_true",
        help="write report.html too: the run on one page, plots and all in a single file",
    )  # fmt: skip
    outputs.add_argument(
        "--json", action="store_true", help="print results.json to stdout, and nothing else"
    )
    outputs.add_argument("--quiet", action="store_true", help="no progress and no notes")
