"""A few images and the logits that an INT8 file gives for them, to compare with on a device."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common.files.atomic import replace_file
from common.images.data import ImageSet
from quantization.files.artifact import load_int8
from quantization.files.int8_file import seal
from runtime.decode import CHECK_MARK

CHECK_IMAGES = 16
SUFFIX = ".check"


@torch.inference_mode()
def write_checks(
    models: Iterable[Path], images: ImageSet, file: Callable[[str], Path], engine: str | None = None
) -> None:
    """Write the file of each model that ``runtime/decode.py --check`` reads.

    Args:
        models: INT8 files.
        images: Images, of which the first few are taken.
        file: Returns the path for a file's name.
        engine: Engine that computes the logits; by default the fastest.
    """
    pixels = images.images[:CHECK_IMAGES].contiguous()
    for path in models:
        model = load_int8(path, engine)
        logits = model(model.normalize(pixels))
        content = seal({"pixels": pixels.numpy(), "logits": logits.numpy()}, CHECK_MARK)
        replace_file(file(f"{path.stem}{SUFFIX}"), lambda f, content=content: f.write(content))
