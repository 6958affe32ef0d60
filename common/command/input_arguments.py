"""The flags that say what a script works on: a network and images; without torch."""

import argparse

from common.command import argument_types as types
from common.command.argument_types import AtMost
from common.command.cli import WORKSPACE
from common.images.normalisation import AUTO, NORMALISATIONS

DEFAULT_DATA_DIR = WORKSPACE / "data"
TEST_IMAGES = 2000


def add_network_arguments(inputs: argparse._ArgumentGroup) -> None:
    """Add the flags that name a checkpoint and the images that its network is for."""
    inputs.add_argument(
        "--weights", type=types.path, metavar="FILE",
        help="checkpoint, or FILE:KEY for one of the state dicts in it; by default "
        "resnet18_cifar10.pth in the working directory, beside the script or in the repository "
        "root, else the bundled weights",
    )  # fmt: skip
    inputs.add_argument(
        "--model", type=types.name, metavar="NAME",
        help="network that --weights belongs to: torchvision:NAME, such as torchvision:vgg11_bn, "
        "or FILE.py:FUNCTION, a function of your own without arguments that returns it, which is "
        "run; by default a ResNet, recognised from the checkpoint",
    )  # fmt: skip
    inputs.add_argument(
        "--max-pool", choices=("auto", "on", "off"), default="auto",
        help="whether a max pool follows a ResNet's first convolution; auto: after one of 7×7 "
        "pixels only",
    )  # fmt: skip
    add_image_arguments(inputs, TEST_IMAGES, with_auto=True)
    inputs.add_argument(
        "--channel-order", choices=("rgb", "bgr"), default="rgb",
        help="bgr for networks trained on images as OpenCV reads them",
    )  # fmt: skip


def add_image_arguments(
    inputs: argparse._ArgumentGroup, test_images: int | None, with_auto: bool = False
) -> None:
    """Add the flags that say where images come from, and how they are prepared.

    ``test_images`` is the default number of test images, None for all. ``with_auto`` is for scripts
    that get a trained network, which can choose the normalisation.
    """
    inputs.add_argument(
        "--data-dir", type=types.path, metavar="DIR", default=DEFAULT_DATA_DIR,
        help="folder with cifar-10-batches-py/ (downloaded there when it is empty), with "
        "cifar-100-python/, or with image folders train/<class>/* and test/<class>/* (or val)",
    )  # fmt: skip
    fallback = inputs.add_mutually_exclusive_group()
    fallback.add_argument(
        "--bundled", action="store_true", help="use the bundled images; download nothing"
    )
    fallback.add_argument(
        "--no-bundled", action="store_true",
        help="fail when CIFAR-10 cannot be had, rather than use the bundled images",
    )  # fmt: skip
    inputs.add_argument(
        "--test-images", type=types.image_count, metavar="N|all",
        default=AtMost(test_images) if test_images else "all",
        help="test images to measure accuracy on: a seeded subset in the proportions of the "
        "classes, or all",
    )  # fmt: skip
    inputs.add_argument(
        "--image-size", metavar="N",
        type=types.integer(1, 1024, "a number of pixels from 1 to 1024"),
        help="cut the middle N×N pixels out of each image, whose short side is scaled to N first; "
        "by default images keep their size, those of different sizes become 224×224",
    )  # fmt: skip
    inputs.add_argument(
        "--resize", metavar="M", type=types.integer(1, 2048, "a number of pixels from 1 to 2048"),
        help="scale the short side to M instead, as 256 for --image-size 224",
    )  # fmt: skip
    choices = [*NORMALISATIONS, *([AUTO] if with_auto else [])]
    inputs.add_argument(
        "--normalize", choices=choices, metavar="NAME",
        help="mean and std of the channels that the network was trained with: "
        + ", ".join(choices)
        + ("; auto: those that fit its batch norms best" if with_auto else "")
        + " (default: cifar10 for images of 32×32 pixels, imagenet for larger ones)",
    )  # fmt: skip
    for flag, what, parse in (
        ("--mean", "mean", types.number(0, 1, "a mean from 0 to 1")),
        ("--std", "standard deviation",
         types.number(1e-3, 1, "a standard deviation from 0.001 to 1")),
    ):  # fmt: skip
        inputs.add_argument(
            flag, type=types.channels(parse), metavar="R,G,B",
            help=f"{what} of the channels, for pixels from 0 to 1",
        )  # fmt: skip
