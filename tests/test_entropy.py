import hashlib
from pathlib import Path

import numpy as np

from common.files import entropy

# Levels of five layers as a released version wrote them. Contexts are integers, so every machine
# must read the same levels from it; a changed context would break all files already written.
STREAM = Path(__file__).with_name("fixtures") / "levels.bin"
SHAPES = [(16, 3, 9), (24, 16, 9), (32, 24, 1), (10, 64, 1), (12, 12, 25)]
SHA256 = "73180fd42836da2d76f3724a0e61708d55dc4cea7617452759e431a519a3413f"


def test_streams_already_written_stay_readable():
    levels = entropy.decode(STREAM.read_bytes(), SHAPES)
    assert hashlib.sha256(b"".join(layer.tobytes() for layer in levels)).hexdigest() == SHA256
    assert max(int(np.abs(layer).max()) for layer in levels) == 81
