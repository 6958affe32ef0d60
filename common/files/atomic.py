"""A file written whole or not at all."""

import os
import secrets
from pathlib import Path

STAGING_PREFIX = ".partial-"  # begins names of temporary folders; the next run removes them


def replace_file(path: Path, content: bytes) -> None:
    """Write a temporary file, which takes the place of ``path`` once it is on the disk."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # that of a full disk names no file, or this one
            error.filename = path.name
        raise
