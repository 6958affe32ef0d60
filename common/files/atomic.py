"""A file written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

STAGING_PREFIX = ".partial-"  # begins the names of folders that a killed run leaves, to be swept


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file, on the disk before it takes its place.

    Args:
        path: Replaced if it exists.
        write: Called with the binary file.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        set_usual_permissions(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # of a full disk: names no file, or the temporary one
            error.filename = path.name
        raise


def set_usual_permissions(path: Path) -> None:
    """Give a temporary file, which is private, the permissions of any other."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
