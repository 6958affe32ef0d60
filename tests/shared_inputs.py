"""Published networks and images beside the repository, and the marks of tests that need them."""

import pytest

from common.command.cli import REPOSITORY

SHARED = REPOSITORY.parent / "shared"
MARKS = [
    pytest.mark.shared,
    pytest.mark.full,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not there"),
]
