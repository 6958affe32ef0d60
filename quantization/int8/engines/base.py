"""An INT8 network on an engine, and what engines make of it: kernel calls, for each batch size."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.command.cli import UserError
from common.images.data import normalize
from quantization.int8.network import Int8Network

# Sizes that a model prepares for, where the kernels are made for a batch size. Each holds a copy
# of the weights, so other sizes share one that takes any.
MAX_PREPARED_SIZES = 8

Run = Callable[[torch.Tensor], torch.Tensor]


class Int8Model(nn.Module, ABC):
    """Maps normalised float32 images (N, C, H, W) on the CPU to float32 logits (N, classes).

    It may be called from several threads, with any number of images in any memory layout. It can
    be copied and pickled: the copy prepares itself anew.
    """

    def __init__(self, network: Int8Network, engine: str):
        super().__init__()
        self.network, self.engine = network, engine
        self._shape = tuple(network.graph.operations[0].attributes["shape"])

    def __reduce__(self) -> tuple:
        return type(self), (self.network, self.engine)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.network.classes

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 images (N, 3, H, W) into the model's input."""
        return normalize(pixels, self.network.mean, self.network.std, self.network.channel_order)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Run the network, or raise a UserError for other inputs; an image with a NaN gets NaNs."""
        self._check(images)
        if not len(images):
            return images.new_empty(0, *self.network.shapes[self.network.graph.output])
        logits = self._run(images)
        if math.isnan(images.sum().item()):
            # The sum is NaN too where infinities of both signs meet.
            has_nan = images.isnan().flatten(1).any(dim=1)
            logits = logits.masked_fill(has_nan[:, None], math.nan)
        return logits

    def _check(self, images: torch.Tensor) -> None:
        if not isinstance(images, torch.Tensor):
            found = type(images).__name__
        elif images.is_nested or images.layout != torch.strided:
            found = "a nested tensor" if images.is_nested else str(images.layout)
        elif images.dtype != torch.float32 or images.shape[1:] != self._shape:
            found = f"{images.dtype} of shape {tuple(images.shape)}"
        elif not images.is_cpu:
            found = f"images on {images.device}"
        else:
            return
        raise UserError(
            f"the network takes float32 images (N, {', '.join(map(str, self._shape))}) on the CPU; "
            f"got {found.removeprefix('torch.')}"
        )

    @property
    def fp32_operations(self) -> dict[str, str]:
        """The operations that do not run on integers, each with the reason."""
        return {
            operation.name: "kept in FP32 to hold the accuracy budget"
            if operation.is_layer
            else "a batch norm that no layer precedes"
            for operation in self.network.graph.operations
            if not self.network.is_int8(operation)
        }

    @abstractmethod
    def _run(self, images: torch.Tensor) -> torch.Tensor:
        """Run the network on one image or more."""


@dataclass(frozen=True)
class Call:
    """A call of a kernel."""

    name: str  # name of the value that it returns
    function: Callable[..., torch.Tensor]  # the kernel, with all but the values bound to it
    inputs: tuple[str, ...]  # names of the values that it takes
    constants: tuple[object, ...] = ()  # packed weights and tensors that the function holds


class Program(nn.Module):
    """Runs calls, from that which takes the images; each value is freed after its last use."""

    def __init__(self, calls: Sequence[Call]):
        super().__init__()
        self._source, self._output = calls[0].inputs[0], calls[-1].name
        last_uses = {name: call for call in calls for name in call.inputs}
        self._calls = [
            (call, [name for name in {*call.inputs} - {call.name} if last_uses[name] is call])
            for call in calls
        ]
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
        for call, freed in self._calls:
            values[call.name] = call.function(*[values[name] for name in call.inputs])
            for name in freed:
                del values[name]
        logits = values[self._output]
        return logits.dequantize() if logits.is_quantized else logits


class PreparedSizes:
    """Programs for the first few batch sizes that are met, made when they are; safe in threads.

    ``prepare`` returns a program for a batch size, or for any if it is None.
    """

    def __init__(self, prepare: Callable[[int | None], Run]):
        self._prepare = prepare
        self._programs: dict[int | None, Run] = {}
        self._lock = threading.Lock()

    def __getitem__(self, size: int | None) -> Run:
        """Return the program for a batch size; with None the one that takes any."""
        if (program := self._programs.get(size)) is not None:
            return program
        with self._lock:
            if size not in self._programs and len(self._programs) >= MAX_PREPARED_SIZES:
                size = None
            if size not in self._programs:
                self._programs[size] = self._prepare(size)
            return self._programs[size]
