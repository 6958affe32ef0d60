"""Runs INT8 networks in torch's quantized kernels.

This module and the two that it calls, ``kernels`` and ``switch``, are all that knows torch's
quantized tensors and TorchScript.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from quantization.int8.engines.kernels import Call, fp32_activations, list_calls
from quantization.int8.engines.runner import PreparedSizes, Run, Runner
from quantization.int8.engines.switch import SWITCH, using
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
    """Runs an INT8 network on one of torch's engines.

    A call sets ``torch.backends.quantized.engine`` and restores it. See
    :class:`quantization.int8.engines.runner.Runner` for the rest.
    """

    def __init__(self, network: Int8Network, engine: str):
        super().__init__(network, engine)
        self._programs = PreparedSizes(self._prepare)

    @property
    def fp32_operations(self) -> dict[str, str]:
        """The operations that do not run on integers, each with the reason."""
        return self.network.fp32_operations() | fp32_activations(self.network)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        program = self._programs[len(images) if self.engine in PREPARES_SIZES else None]
        SWITCH.acquire(self.engine)  # a context manager takes twice the time
        try:
            return program(images.contiguous(memory_format=torch.channels_last))
        finally:
            SWITCH.release()

    def _prepare(self, size: int | None) -> Run:
        with _preparing, warnings.catch_warnings():
            warnings.filterwarnings("ignore", DEPRECATIONS)
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                program = Program(list_calls(self.network, self.engine)).eval()
                shape = (size or 1, *self._shape)
                example = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
                with using(self.engine):
                    if CAN_TRACE:
                        return torch.jit.trace(program, example, check_trace=False)
                    program(example)
                    return program


class Program(nn.Module):
    """Calls in a row; each value is freed after its last use.

    Args:
        calls: Calls in execution order. The first takes the images, the last gives the logits.
    """

    def __init__(self, calls: Sequence[Call]):
        super().__init__()
        self._source, self._output = calls[0].inputs[0], calls[-1].name
        last_uses = {name: call.name for call in calls for name in call.inputs}
        self._calls = [
            (call.name, call.function, call.inputs,
             tuple(name for name in set(call.inputs) - {call.name} if last_uses[name] == call.name))
            for call in calls
        ]  # fmt: skip
        # A trace knows the packed weights and tensors that are attributes of its module.
        constants = [constant for call in calls for constant in call.constants]
        for index, constant in enumerate(constants):
            if isinstance(constant, torch.Tensor):
                self.register_buffer(f"constant_{index}", constant, persistent=False)
            else:
                setattr(self, f"constant_{index}", constant)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images to FP32 logits."""
        values = {self._source: images}
        for name, function, inputs, freed in self._calls:
            values[name] = function(*[values[source] for source in inputs])
            for source in freed:
                del values[source]
        logits = values[self._output]
        return logits.dequantize() if logits.is_quantized else logits

