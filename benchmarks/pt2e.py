"""PT2E quantization with torchao's x86 quantizer: the named successor of ``torch.ao``.

Its graph runs fast only when inductor compiles it, which needs a C++ compiler, and what
AOTInductor saves is for one batch size: so there is one package for each, as our own deployed model
is prepared for each.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from common.images.data import Cifar10, batches
from common.network.resnet import ResNet18
from quantization.int8.deploy import blank_images

CALIBRATION_BATCH = 64


class Pt2eModel:
    """A PT2E INT8 model, compiled ahead of time for every batch size that it meets."""

    def __init__(self, converted: nn.Module, folder: Path):
        self._converted, self._folder = converted, folder
        self._packages = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (N, 10) of channels_last float32 images (N, 3, 32, 32)."""
        count = len(images)
        if count not in self._packages:
            self._packages[count] = torch._inductor.aoti_load_package(str(self.package(count)))
        return self._packages[count](images)

    def package(self, batch_size: int) -> Path:
        """Compile for a batch size; return the package's path."""
        path = self._folder / f"pt2e_{batch_size}.pt2"
        if not path.exists():
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "To copy construct from a tensor")  # its own
                program = torch.export.export(self._converted, (blank_images(batch_size),))
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs={"freezing": True}
                )
        return path


def quantize(model: ResNet18, calibration: Cifar10) -> nn.Module:
    """Return the INT8 graph of torchao's x86 quantizer with its default settings.

    Args:
        model: FP32, in eval mode; left as it is.
        calibration: The same images as for every other runtime.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.inference_mode(False), torch.no_grad():
        any_batch = {0: torch.export.Dim("N", max=1024)}
        program = torch.export.export(model, (blank_images(2),), dynamic_shapes=(any_batch,))
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program.module(), quantizer)
        for images, _ in batches(calibration, CALIBRATION_BATCH):
            prepared(images)
        return convert_pt2e(prepared)
