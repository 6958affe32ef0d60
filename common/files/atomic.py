"""A file written whole or not at all."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

STAGING_PREFIX = ".partial-"  # begins names of temporary folders; the next run removes them


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a temporary file, which takes the place of ``path`` once on the disk."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # that of a full disk names no file, or this one
            error.filename = path.name
        raise
