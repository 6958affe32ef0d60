"""Runs INT8 networks in torch's quantized kernels.

Only this module and those that it calls, ``calls``, ``kernels`` and ``switch``, know torch's
quantized tensors. TorchScript is known here alone.
"""

import sys
import threading
import warnings

import torch

from quantization.int8.engines.base import PreparedSizes, Run, Runner
from quantization.int8.engines.calls import CallBuilder
from quantization.int8.engines.kernels import fp32_activations
from quantization.int8.engines.program import Program
from quantization.int8.engines.switch import UsingEngine
from quantization.int8.network import Int8Network

# Kernels of oneDNN are made for a shape; x86 calls oneDNN or fbgemm, whichever it takes to be
# faster for a layer.
PREPARES_SIZES = ("x86", "onednn")
# A packed weight that goes from Python to a kernel costs 8 µs, since torch finds out its class at
# each call. At batch 1 that is a tenth of the time, which a TorchScript trace saves.
CAN_TRACE = sys.version_info < (3, 14) and hasattr(torch, "jit")
DEPRECATIONS = "torch.quantize_per_tensor|`torch.jit"
_preparing = threading.Lock()  # traces in two threads at once can crash


class TorchRunner(Runner):
    """Runs an INT8 network on one of torch's engines, which is set during a call alone."""

    def __init__(self, network: Int8Network, engine: str):
        super().__init__(network, engine)
        self._programs, self._using = PreparedSizes(self._prepare), UsingEngine(engine)

    @property
    def fp32_operations(self) -> dict[str, str]:
        """The operations that do not run on integers, each with the reason."""
        return self.network.fp32_operations() | fp32_activations(self.network, self.engine)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        program = self._programs[len(images) if self.engine in PREPARES_SIZES else None]
        with self._using:
            return program(images.contiguous(memory_format=torch.channels_last))

    def _prepare(self, size: int | None) -> Run:
        with _preparing, warnings.catch_warnings():
            warnings.filterwarnings("ignore", DEPRECATIONS)
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                program = Program(CallBuilder(self.network, self.engine).build()).eval()
                shape = (size or 1, *self._shape)
                example = torch.zeros(shape, dtype=torch.float32, device="cpu")
                example = example.contiguous(memory_format=torch.channels_last)
                with self._using:
                    if CAN_TRACE:
                        return torch.jit.trace(program, example, check_trace=False)
                    program(example)
                    return program
