"""The pruned model's file: written, read back, and measured.

It is a plain checkpoint with the original names. Its zeros still take four bytes each; their worth
shows once the file is compressed.
"""

import copy
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from common.command.cli import UserError
from common.files.atomic import replace_file
from common.files.untrusted import read_untrusted, serialize
from common.images.data import ImageSet
from common.measure.evaluate import Paired
from common.measure.latency import Contender, time_interleaved

# Endings of file names. With a search over many layers, its model has the first; the model of the
# search over the linear layers then has the second.
PRUNED_ENDING, LINEAR_ENDING = "_pruned.pth", "_pruned_linear.pth"
# At most this many predictions of the reloaded model may differ from the search's.
MAX_FLIPS = 1e-3
TIMED_BATCH_SIZE, TIMED_AMOUNT = 16, 0.9


def save_pruned(
    dense: nn.Module, pruned: nn.Module, path: Path
) -> tuple[nn.Module, dict[str, int]]:
    """Write the pruned model and read it back: the same tensors, bit for bit.

    Return the model that was read, on the CPU, and sizes in bytes, plain and compressed by zlib.
    """
    plain, content = (
        serialize({name: t.cpu().contiguous() for name, t in model.state_dict().items()})
        for model in (dense, pruned)
    )
    replace_file(path, lambda file: file.write(content))
    state, read = pruned.state_dict(), read_untrusted(path)
    if any(not torch.equal(tensor.cpu(), read[name]) for name, tensor in state.items()):
        raise AssertionError(f"{path.name} gives back other tensors than were saved")
    reloaded = copy.deepcopy(pruned).cpu()
    reloaded.load_state_dict(read)
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter while it works
        # Level 1, as random mantissas gain nothing from more.
        small = list(pool.map(lambda data: len(zlib.compress(data, 1)), (plain, content)))
    return reloaded, {
        "dense_bytes": len(plain),
        "dense_compressed_bytes": small[0],
        "pruned_bytes": path.stat().st_size,
        "pruned_compressed_bytes": small[1],
    }


def confirm(dense_correct: torch.Tensor, expected: torch.Tensor, correct: torch.Tensor) -> dict:
    """Compare the reloaded model's correct images with those that the search ``expected``.

    Return its part of results.json; if more than 1 image in 1,000 differs, raise a UserError.
    """
    unlike = int((correct != expected).sum())
    if unlike > max(1, MAX_FLIPS * len(correct)):
        raise UserError(f"the reloaded model differs from the search on {unlike} images")
    return Paired.of(dense_correct, correct).as_dict() | {"images_unlike_search": unlike}


def time_zeros(models: Mapping[str, nn.Module], images: ImageSet) -> list[dict]:
    """Time models in turns on the CPU, on some of the images; return entries of results.json."""
    contenders = []
    for name, model in models.items():
        laid_out = copy.deepcopy(model).cpu().to(memory_format=torch.channels_last)
        contenders.append(Contender(name, torch.inference_mode()(laid_out)))
    batch = images.normalize(images.images[:TIMED_BATCH_SIZE].cpu())
    timings = time_interleaved(contenders, batch, (TIMED_BATCH_SIZE,), seconds_per_batch_size=1.5)
    return [{"name": name} | timing.as_dict() for name, (timing,) in timings.items()]
