"""A converted model, run operation by operation: what is INT8 in it, and its biases."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from common.images.cifar10 import IMAGE_SIZE


@torch.inference_mode()
def list_operations(converted: GraphModule) -> dict[str, bool]:
    """Return whether each operation of a converted model runs in INT8, by name, in their order.

    Listed is what lies between its first quantize and its last dequantize.

    The model is run on a blank image, and an operation is INT8 if what it returned is: the proof
    does not rest on the names of classes.
    """
    run = Interpreter(converted, garbage_collect_values=False)
    run.run(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return {
        node.target if node.op == "call_module" else node.name: value.is_quantized
        for node, value in run.env.items()
        if node.op.startswith("call_")
        and node.target not in (torch.quantize_per_tensor, "dequantize")
    }


@torch.inference_mode()
def round_biases(converted: GraphModule) -> None:
    """Round a converted model's biases, in place, to the INT32 steps in which products are summed.

    torch's kernels would take them in FP32, other runtimes cannot; rounded, all of them compute the
    same.
    """
    _BiasRounder(converted).run(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def layer_of(converted: GraphModule, name: str) -> nn.Module:
    """Return a layer of a calibrated or converted model by its name in the network.

    A convolution not in INT8 is fused with the ReLU after it into a sequence of the two.
    """
    module = converted.get_submodule(name)
    return module[0] if isinstance(module, nn.Sequential) else module


class _BiasRounder(Interpreter):
    """Rounds the bias of every INT8 layer before it runs: only then is its input's scale known."""

    def run_node(self, node: Node) -> object:
        module = self.fetch_attr(node.target) if node.op == "call_module" else None
        if hasattr(module, "set_weight_bias"):
            (image, *_), _ = self.fetch_args_kwargs_from_env(node)
            weight, bias = module.weight(), module.bias().double()
            steps = image.q_scale() * weight.q_per_channel_scales().double()
            module.set_weight_bias(weight, ((bias / steps).round() * steps).float())
        return super().run_node(node)
