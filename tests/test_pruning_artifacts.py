import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from pruning import artifacts


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from([(3, 5), (4, 3, 3, 3), (17,)]))
def test_packed_state_comes_back_bit_for_bit(tmp_path_factory, seed, zeros, shape):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < zeros] = 0
    state = {"a.weight": weight, "a.count": torch.tensor(3), "b": torch.randn(4)}
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    artifacts.save_packed(state, path)
    loaded = artifacts.load_packed(path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_packing_pays(tmp_path):
    weight = torch.randn(512, 512)
    weight[torch.rand(512, 512) < 0.9] = 0
    kept = int(weight.count_nonzero())
    artifacts.save_packed({"weight": weight}, tmp_path / "packed")
    size = (tmp_path / "packed").stat().st_size
    # A bit a weight is at most 1, here 0.47 by entropy; signs and exponents take less than a byte.
    assert 3 * kept < size < 512 * 512 / 8 * 0.55 + 3.7 * kept
    data = (tmp_path / "packed").read_bytes()
    assert artifacts.compressed_bytes(tmp_path / "packed") == len(zlib.compress(data, 1))


def test_a_disk_that_fills_up_is_an_os_error(full_disk, tmp_path):
    """safetensors' own writer ends in an error of its own."""
    (tmp_path / "packed").write_text("earlier")
    with full_disk(), pytest.raises(OSError, match="too large: 'packed'"):
        artifacts.save_packed({"weight": torch.randn(50, 50)}, tmp_path / "packed")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_dense_tensors_are_left_as_they_are():
    tensors, _ = artifacts.pack({"weight": torch.ones(4, 4)})
    assert list(tensors) == ["weight"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="no such file"):
        artifacts.load_packed(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="damaged"):
        artifacts.load_packed(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(UserError, match="no packed model"):
        artifacts.load_packed(path)
    artifacts.save_packed({"weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        artifacts.load_packed(path)
