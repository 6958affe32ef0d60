"""Where pixels come from: CIFAR's archives, image folders, or the bundled images."""

import argparse
import http.client
import os
from dataclasses import replace
from pathlib import Path

from common.command.cli import UserError, log
from common.command.input_arguments import DEFAULT_DATA_DIR
from common.images import cifar
from common.images.cifar import BATCHES_FOLDER, CIFAR100_FOLDER
from common.images.decoding import Sizing
from common.images.folders import SPLIT_FOLDERS, find_splits, folder_source
from common.images.loading import Source
from common.images.normalisation import NORMALISATIONS, Statistics

SHOWN_ENTRIES = 8  # of a folder that is not recognised


def open_source(
    data_dir: Path, bundled: bool = False, allow_bundled: bool = True,
    sizing: Sizing | None = None, is_given: bool = False,
) -> Source:  # fmt: skip
    """Find images: CIFAR's batches or image folders in ``data_dir``, or the bundled images.

    CIFAR-10 is downloaded to an empty folder. Where that fails, the bundled images take its place
    with a warning, if that is allowed and the user did not name the folder (``is_given``). Without
    a ``sizing``, images have their own size.

    Raises:
        UserError: The folder is missing, damaged or not recognised, or the download failed.
    """
    cifar_size = sizing or cifar.OWN_SIZE
    if bundled:
        return cifar.bundled_source(cifar_size)
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir}: not a folder")
    for folder in (BATCHES_FOLDER, CIFAR100_FOLDER):
        if (data_dir / folder).exists():
            return cifar.batches_source(data_dir, folder, cifar_size)
    if find_splits(data_dir):
        return folder_source(data_dir, sizing)
    if is_given:
        _refuse_other_content(data_dir)
    try:
        cifar.download_cifar10(data_dir)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error or type(error).__name__
        reason = f"CIFAR-10 is not in {data_dir} and could not be downloaded ({cause})"
        if is_given or not allow_bundled:
            raise UserError(reason) from error
        log.warning("%s: going on with the bundled JPEG images", " ".join(reason.split()))
        return cifar.bundled_source(cifar_size)
    return cifar.batches_source(data_dir, BATCHES_FOLDER, cifar_size)


def open_chosen_source(args: argparse.Namespace, found: Statistics | None = None) -> Source:
    """Open the source that the flags ask for, see :func:`open_source`.

    ``--mean`` and ``--std``, else ``--normalize``, else what was ``found`` in the checkpoint take
    the place of the source's own constants; ``--normalize auto`` leaves these.
    """
    chosen = vars(args).get
    side = chosen("image_size")
    source = open_source(
        args.data_dir, args.bundled, not args.no_bundled,
        Sizing(side, side, chosen("resize") or side) if side else None,
        is_given=args.data_dir != DEFAULT_DATA_DIR,
    )  # fmt: skip
    mean, std = NORMALISATIONS.get(chosen("normalize"), (source.mean, source.std))
    uses_found = found is not None and chosen("normalize") is None
    if uses_found:
        mean, std = found
    mean, std = chosen("mean") or mean, chosen("std") or std
    if uses_found:
        log.info("normalisation: mean %s and std %s; the checkpoint holds them", mean, std)
    return replace(source, mean=mean, std=std, channel_order=chosen("channel_order") or "rgb")


def _refuse_other_content(data_dir: Path) -> None:
    if not data_dir.exists():
        raise UserError(f"{data_dir}: no such folder; make it to have CIFAR-10 downloaded there")
    entries = sorted(path for path in data_dir.iterdir() if not path.name.startswith("."))
    for other in (data_dir.absolute().parent, *entries) if entries else ():
        if os.access(other, os.X_OK) and len(find_splits(other)) == len(SPLIT_FOLDERS):
            raise UserError(f"{data_dir}: has no folders train/ and test/; {other} has them")
    if names := [path.name + "/" * path.is_dir() for path in entries]:
        shown = ", ".join(names[:SHOWN_ENTRIES]) + (", …" if len(names) > SHOWN_ENTRIES else "")
        raise UserError(
            f"{data_dir}: neither {BATCHES_FOLDER}/ nor {CIFAR100_FOLDER}/ nor image folders "
            f"train/<class>/ and test/<class>/ (or val/<class>/) are there, but {shown}"
        )
