"""Checkpoints: the layouts that are read, and where weights are looked for.

What each bad checkpoint is answered with stands in docs/bad_input.md (test_bad_input.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from networks import dequantized
from safetensors.torch import save_file

from common.checkpoints import checkpoint
from common.checkpoints.checkpoint import (
    BUNDLED_WEIGHTS,
    WEIGHTS_NAME,
    WeightsFile,
    find_weights,
    load_model,
    load_network,
)
from common.checkpoints.layouts import NESTING_KEYS
from common.command import cli
from quantization.files.int8_file import save_int8
from quantization.settings import Settings


def to_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        name = name.replace(".shortcut.", ".downsample.")
        renamed["fc." + name.removeprefix("linear.") if name.startswith("linear.") else name] = (
            value
        )
    return renamed


def without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


LAYOUTS = {
    "canonical": lambda s: s,
    "DataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled DataParallel": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "torchvision": to_torchvision,
    "without counters": without_counters,
    "parameters": lambda s: {
        k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {}, "lr": 0.1}},
    "model": lambda s: {"epoch": 3, "model": to_torchvision(s)},
    "net": lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 93.1, "epoch": 3},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, legacy, tiny_state, tmp_path, capsys):
    cli.set_up_messages(quiet=False)
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](tiny_state), path, _use_new_zipfile_serialization=not legacy)
    state = load_model(path).state_dict()
    own = tiny_state if layout not in ("torchvision", "model") else to_torchvision(tiny_state)
    assert list(state) == list(own)
    for name, value in state.items():
        if layout == "without counters" and name.endswith("num_batches_tracked"):
            assert value == 0
        else:
            assert torch.equal(value, own[name])
        assert not value.requires_grad
    told = capsys.readouterr().err
    assert (f"{path}: its entry {layout} is taken\n" in told) == (layout in NESTING_KEYS)
    assert ("the prefix module. of all names" in told) == ("Parallel" in layout or layout == "net")
    assert ("_orig_mod taken out of the names" in told) == ("compiled" in layout)


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors", ".bin"])
def test_safetensors(suffix, tiny_state, tmp_path):
    save_file(to_torchvision(tiny_state), tmp_path / f"weights{suffix}")
    state = load_model(tmp_path / f"weights{suffix}").state_dict()
    own = to_torchvision(tiny_state)
    assert all(torch.equal(state[name], value) for name, value in own.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_said(dtype, tiny_state, tmp_path, capsys):
    cli.set_up_messages(quiet=False)
    path = tmp_path / "weights.pth"
    torch.save(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_state.items()}, path
    )
    state = load_model(path).state_dict()
    for name, value in tiny_state.items():
        expected = value.to(dtype).float() if value.is_floating_point() else value
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], expected)
    name = str(dtype).removeprefix("torch.")
    assert capsys.readouterr().err == f"{path}: {name} weights, converted to float32\n"


def test_load_model_is_ready_to_evaluate(tiny_state, tiny_model, tmp_path):
    torch.save(tiny_state, tmp_path / "weights.pth")
    model = load_model(tmp_path / "weights.pth")
    assert not model.training
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), tiny_model(x))


def test_shapes_that_do_not_fit_together_are_refused(tiny_state, tmp_path):
    torch.save(tiny_state | {"layer2.0.conv2.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "w.pth")
    wrong = r"layer2\.0\.conv2\.weight has shape \(8, 4, 3, 3\) instead of \(8, 5, 3, 3\)"
    with pytest.raises(cli.UserError, match=wrong):
        load_model(tmp_path / "w.pth")


def test_bundled_weights_are_readable():
    assert sum(p.numel() for p in load_model(BUNDLED_WEIGHTS).parameters()) == 11_173_962


def test_weights_are_looked_for_in_order(tmp_path, monkeypatch):
    work, script, root = (tmp_path / name for name in ("work", "script", "root"))
    for place in (work, script, root):
        place.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(checkpoint, "REPOSITORY", root)
    assert find_weights(None, script).path == BUNDLED_WEIGHTS
    for place, words in ((root, "repository root"), (script, "script's folder"), (work, "working")):
        (place / WEIGHTS_NAME).touch()
        found = find_weights(None, script)
        assert found.path == place / WEIGHTS_NAME
        assert words in found.found
    chosen = find_weights(Path("mine.pth"), script)
    assert (chosen.path, chosen.found) == (Path("mine.pth"), "--weights mine.pth")


def test_sha256(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    described = find_weights(path, tmp_path).describe()
    assert described["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert (described["size_bytes"], described["coded"]) == (len(b"weights"), False)


# --- writing -------------------------------------------------------------------------------------


def test_a_written_checkpoint_is_what_torch_would_write(tiny_state, tmp_path):
    checkpoint.save_checkpoint(tiny_state, tmp_path / "weights.pth")
    with (tmp_path / "expected.pth").open("wb") as file:
        torch.save(tiny_state, file)
    assert (tmp_path / "weights.pth").read_bytes() == (tmp_path / "expected.pth").read_bytes()


def test_a_disk_that_fills_up_is_an_os_error(tiny_state, full_disk, tmp_path):
    """torch's own writer ends in a RuntimeError."""
    (tmp_path / "weights.pth").write_text("earlier")
    with full_disk(), pytest.raises(OSError, match=r"too large: 'weights\.pth'"):
        checkpoint.save_checkpoint(tiny_state, tmp_path / "weights.pth")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_an_int8_file_is_read_as_the_fp32_network_of_its_levels(convert, random_images, tmp_path):
    network = convert(Settings())
    save_int8(network, tmp_path / "int8.safetensors")
    loaded = load_network(WeightsFile(tmp_path / "int8.safetensors", ""))
    assert loaded.family == "resnet18-cifar"
    assert loaded.statistics == (network.mean, network.std)
    images = random_images(8)
    batch = images.normalize(images.images)
    with torch.no_grad():
        found, expected = loaded.model(batch), dequantized(network)(batch)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
