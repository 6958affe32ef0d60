"""What a run that was stopped left to continue from: used by the same run alone, never lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.command.cli import UserError


def require_same_settings(path: Path, before: Mapping, now: Mapping) -> None:
    """Check that ``path`` was left by a run of the same settings, named for the user.

    Raises:
        UserError: It was not; the file stays as it is.
    """
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if names:
        raise UserError(
            f"{path}: left by a run that differs in {' and '.join(names)}; resume it as it was "
            "started, or discard it with --overwrite"
        )


def refuse_to_discard(path: Path) -> None:
    """Say what becomes of an unfinished run that nobody asked to continue.

    Raises:
        UserError: Always.
    """
    raise UserError(
        f"{path}: left by an unfinished run; continue it with --resume or discard it with "
        "--overwrite"
    )
