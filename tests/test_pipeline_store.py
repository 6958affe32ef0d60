"""Networks that are kept while a run is unfinished."""

from __future__ import annotations

import pytest
import torch

from common.checkpoints.checkpoint import save_checkpoint
from common.command.cli import UserError
from common.files.unfinished import PartialResults
from common.network.tracing import trace_network
from pipeline import store as module
from pipeline.store import Store
from quantization.int8.conversion import convert, observe
from quantization.settings import Settings


def tensors_of(network):
    """Return the tensors of a module, or of an INT8 network."""
    if isinstance(network, torch.nn.Module):
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return {name: layer.weight.clone() for name, layer in network.layers.items()}


@pytest.mark.parametrize("kind", ["slim", "int8"])
def test_a_network_is_made_once_and_again_where_its_file_is_damaged(
    tmp_path, tiny_model, random_images, kind
):
    images, made = random_images(8), []

    def make():
        made.append(1)
        if kind == "slim":
            return tiny_model
        network = trace_network(tiny_model, images.shape)
        return convert(observe(network, images, "minmax", 8), Settings(observer="minmax"))

    partial = PartialResults(tmp_path / "unfinished", {}, resume=False)
    keep = getattr(Store(partial, tiny_model), kind)
    first, path = keep("half", make)
    again, same = keep("half", make)
    assert (made, same) == ([1], path)
    expected, found = tensors_of(first), tensors_of(again)
    path.write_bytes(path.read_bytes()[:1000])
    mended, _ = keep("half", make)
    assert made == [1, 1]
    for state in (found, tensors_of(mended)):
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name


def test_a_run_that_is_resumed_keeps_its_precision(tmp_path, tiny_model, monkeypatch):
    folder, cpu, meta = tmp_path / "unfinished", torch.device("cpu"), torch.device("meta")
    monkeypatch.setattr(module, "choose_precision", lambda device: "bf16")
    store = Store(PartialResults(folder, {}, resume=False), tiny_model)
    assert store.precision(cpu) == "bf16"
    save_checkpoint(tiny_model.state_dict(), folder / "half.pth")
    monkeypatch.setattr(module, "choose_precision", lambda device: "fp32")  # a busy machine
    assert store.precision(cpu) == "bf16"
    resumed = Store(PartialResults(folder, {}, resume=True), tiny_model)
    assert resumed.precision(cpu) == "bf16"
    assert resumed.precision(meta) == "fp32"  # where networks were not trained before
    assert Store(PartialResults(folder, {}, resume=True), tiny_model).precision(cpu) == "bf16"
    (folder / "precision.json").write_bytes(b"damaged")
    with pytest.raises(UserError, match="start anew with --overwrite"):
        Store(PartialResults(folder, {}, resume=True), tiny_model).precision(cpu)
