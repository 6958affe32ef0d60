"""Shapes inferred without images, against those of an image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_kind import make_every_kind
from torch import nn

from common.network.graph import Graph, Operation
from common.network.operations import infer_shapes
from common.network.tracing import trace_network

REPOSITORY = Path(__file__).resolve().parents[1]


def assert_same(model, shape):
    network = trace_network(model.eval(), shape)
    names = [operation.name for operation in network.graph.operations]
    with torch.inference_mode():
        values = network.run({network.graph.input: torch.zeros(1, *shape)}, names)
    assert network.shapes == {name: tuple(value.shape[1:]) for name, value in values.items()}


def test_every_kind():
    assert_same(make_every_kind(), (3, 12, 12))


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("size", range(5, 12))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 3, 1)])
def test_pools(size, kernel, stride, padding, ceil):
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 2, 1), nn.Linear(4, 5)
            self.max = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
            self.mean = nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(torch.cat([self.max(x), self.mean(x)], 1).mean((2, 3)))

    assert_same(Pools(), (3, size, size))


def graph_of(*operations):
    return Graph((Operation("x", "input", (), {"shape": [3, 8, 8]}), *operations))


GEOMETRY = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


@pytest.mark.parametrize(
    ("kind", "attributes", "weight"),
    [
        ("convolution", GEOMETRY, (4, 2, 3, 3)),
        ("convolution", GEOMETRY | {"groups": 3}, (4, 1, 3, 3)),
        ("convolution", GEOMETRY | {"stride": [0, 1]}, (4, 3, 3, 3)),
        ("convolution", GEOMETRY | {"padding": [-1, 1]}, (4, 3, 3, 3)),
        ("convolution", GEOMETRY | {"dilation": [0, 1]}, (4, 3, 3, 3)),
        ("convolution", GEOMETRY, (4, 3, 9, 9)),
        ("linear", {}, (5, 7)),
        ("affine", {}, (1,)),
        ("reshape", {"shape": [5, 5]}, None),
        ("permute", {"order": [1, 0, 2, 3]}, None),
        ("slice", {"parts": [[0, 0, 1, 1]]}, None),
        ("slice", {"parts": [[1, 3, 5, 1]]}, None),
        ("pad", {"padding": [1, 1, -9, 0]}, None),
        ("adaptive_average_pool", {"size": [0, 1]}, None),
        ("adaptive_average_pool", {"size": [1.5, 1]}, None),
    ],
)
def test_what_cannot_run_is_refused(kind, attributes, weight):
    graph = graph_of(Operation("y", kind, ("x",), attributes))
    with pytest.raises((ValueError, TypeError), match=r"y gives|fit|below|cannot|batch|size|int"):
        infer_shapes(graph, {"y": weight})


def test_no_compiler_is_imported():
    """It would take a second of every process that reads a file."""
    program = (
        "import sys, torch\n"
        "from common.network.graph import Graph, Operation\n"
        "from common.network.execution import Layer, Network\n"
        "layers = {'y': Layer(torch.zeros(2, 12), torch.zeros(2))}\n"
        "graph = Graph((Operation('x', 'input', (), {'shape': [12]}),\n"
        "               Operation('y', 'linear', ('x',))))\n"
        "assert Network(graph, layers).shapes['y'] == (2,)\n"
        "assert not {'sympy', 'torch._inductor', 'torch._dynamo'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
