"""The download of CIFAR-10: there is all of it afterwards, or nothing."""

import contextlib
import io
import logging
import socket
import tempfile
from pathlib import Path

from common.command.cli import log

BATCHES_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-py", "cifar-100-python"
# Of each socket operation, so that a stalled download ends and a slow one does not.
DOWNLOAD_TIMEOUT_SECONDS = 20.0


def download_cifar10(data_dir: Path) -> None:
    """Download CIFAR-10 into ``data_dir``; it appears there complete or not at all.

    A failure of network or disk is an OSError or an HTTPException, a wrong MD5 a RuntimeError.
    """
    from torchvision.datasets import CIFAR10

    log.info("downloading CIFAR-10 (170 MB) to %s", data_dir)
    created = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as staging:
            with contextlib.ExitStack() as muted:
                # torchvision prints to stdout, which belongs to the results.
                muted.enter_context(contextlib.redirect_stdout(io.StringIO()))
                if not log.isEnabledFor(logging.INFO):  # --quiet: no progress bar either
                    muted.enter_context(contextlib.redirect_stderr(io.StringIO()))
                CIFAR10(staging, download=True)
            try:
                (Path(staging) / BATCHES_FOLDER).rename(data_dir / BATCHES_FOLDER)
            except OSError:
                if not (data_dir / BATCHES_FOLDER).exists():  # where it does, another was faster
                    raise
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        socket.setdefaulttimeout(timeout)
