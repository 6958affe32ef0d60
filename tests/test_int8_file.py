"""INT8 files: the very same network comes back, and no other file is believed."""

from __future__ import annotations

import json
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from every_kind import make_every_kind, make_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_fresh
from safetensors import safe_open
from safetensors.torch import save_file

from common.command.cli import UserError
from common.network.tracing import trace_network
from quantization.files import dense_levels, int8_file
from quantization.files.int8_file import is_int8_file, read_int8, save_int8
from quantization.int8.conversion import convert, observe
from quantization.settings import Settings


@pytest.fixture(scope="module")
def observation():
    return observe(trace_network(make_every_kind(), (3, 12, 12)), make_images(16), "minmax", 16)


@pytest.fixture(scope="module")
def saved(observation, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_int8(convert(observation, Settings(fp32_layers=("hidden",))), path)
    return path


def assert_same(one, two):
    assert (one.graph, one.ranges, one.settings) == (two.graph, two.ranges, two.settings)
    assert (one.classes, one.mean, one.std) == (two.classes, two.mean, two.std)
    for left, right, parts in (
        (one.layers, two.layers, ("weight", "scales", "bias")),
        (one.affine, two.affine, ("weight", "bias")),
    ):
        assert left.keys() == right.keys()
        for name, layer in left.items():
            for part in parts:
                assert torch.equal(getattr(layer, part), getattr(right[name], part)), (name, part)
                assert getattr(layer, part).dtype == getattr(right[name], part).dtype


def rewrite(path, change, checksum=True):
    """Write the file anew with its tensors, JSON and metadata changed, as a forger would."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = json.loads(zlib.decompress(tensors["network"].numpy().tobytes()))
    before = json.dumps(fields)
    change(tensors, fields, metadata)
    if json.dumps(fields) != before:
        packed = zlib.compress(json.dumps(fields).encode())
        tensors["network"] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    if checksum:
        metadata["sha256"] = int8_file.checksum(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("fp32_layers", [(), ("stem", "depthwise", "classify")])
def test_the_very_same_network_comes_back(observation, tmp_path, fp32_layers):
    network = convert(observation, Settings("onednn", True, "minmax", fp32_layers))
    path = tmp_path / "model.safetensors"
    assert save_int8(network, path) == path.stat().st_size
    assert is_int8_file(path)
    assert_same(read_int8(path), network)


def test_the_same_network_gives_the_same_bytes(saved, tmp_path):
    program = (
        "from pathlib import Path\n"
        "from quantization.files.int8_file import read_int8, save_int8\n"
        f"save_int8(read_int8(Path({str(saved)!r})), Path({str(tmp_path / 'again')!r}))\n"
    )
    for _ in range(2):
        process = run_fresh("-c", program)
        assert process.returncode == 0, process.stderr
        assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_large_layers_come_back_sparse_and_dense(observation, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_levels, "MIN_WEIGHTS", 100)
    network = convert(observation, Settings())
    network.layers["hidden"].weight[:] = 0
    network.layers["hidden"].weight[3, 5] = -128
    path = tmp_path / "model.safetensors"
    save_int8(network, path)
    with safe_open(path, framework="pt") as file:
        assert {"levels", "dense_levels"} <= set(file.keys())
    assert_same(read_int8(path), network)


def test_a_network_of_fp32_layers_has_no_levels(observation, tmp_path):
    network = convert(observation, Settings(fp32_layers=observation.network.graph.layers))
    path = tmp_path / "model.safetensors"
    save_int8(network, path)
    assert_same(read_int8(path), network)


@pytest.mark.parametrize("spread", [0.3, 3, 90])
def test_dense_levels_come_back_near_their_entropy(spread):
    rng = np.random.default_rng(0)
    layers = [
        np.clip(np.round(rng.normal(size=shape) * spread), -128, 127).astype(np.int8)
        for shape in ((64, 64, 9), (300, 70), (5,))
    ]
    stream = dense_levels.encode(layers)
    for old, new in zip(layers, dense_levels.decode(stream, [x.size for x in layers]), strict=True):
        assert np.array_equal(old.reshape(-1), new)
    bits = 0.0
    for levels in layers:
        shares = np.unique(levels, return_counts=True)[1] / levels.size
        bits -= levels.size * float(shares @ np.log2(shares))
    assert len(stream) - len(layers) * 2 * dense_levels.LEVELS < 1.001 * bits / 8 + 16


def test_a_layer_of_one_level_comes_back():
    layer = np.full((100, 7), 5, np.int8)
    (found,) = dense_levels.decode(dense_levels.encode([layer]), [layer.size])
    assert np.array_equal(found, layer.reshape(-1))


@pytest.mark.parametrize("change", [lambda s: s[:20], lambda s: s[:-1], lambda s: s + bytes(400)])
def test_streams_of_another_length_are_refused(change):
    levels = np.random.default_rng(0).integers(-5, 6, 4000).astype(np.int8)
    with pytest.raises(ValueError, match="coded levels"):
        dense_levels.decode(change(dense_levels.encode([levels])), [levels.size])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_or_damaged_file_is_refused_in_one_line(saved, tmp_path, data):
    content = bytearray(saved.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.safetensors: ") as refused:
        read_int8(path)
    assert "\n" not in str(refused.value)


def _operation(name, **fields):
    def change(tensors, json_fields, metadata):
        next(o for o in json_fields["graph"] if o["name"] == name).update(fields)

    return change


def _settings(**fields):
    return lambda t, j, m: j["settings"].update(fields)


FORGERIES = [
    (lambda t, j, m: t.update(levels=torch.zeros(4, dtype=torch.uint8)), "cut off"),
    (lambda t, j, m: t.update(levels=torch.zeros(1 << 20, dtype=torch.uint8)), "coded levels"),
    (lambda t, j, m: t.update(levels=t["levels"].float()), "levels has another"),
    (lambda t, j, m: t.update(network=t["network"].float()), "network has another"),
    (lambda t, j, m: t.update(network=t["network"][:50]), "cut off"),
    (lambda t, j, m: t.pop("network"), "network"),
    (lambda t, j, m: t.pop("levels"), "levels"),
    (lambda t, j, m: t.pop("biases"), "biases"),
    (lambda t, j, m: t.update(evil=torch.zeros(1)), "evil is missing or unexpected"),
    (lambda t, j, m: t.update(biases=torch.zeros(9)), "another shape"),
    (lambda t, j, m: t["biases"].fill_(float("nan")), "NaN"),
    (lambda t, j, m: t["scales"].fill_(float("nan")), "NaN"),
    (lambda t, j, m: t["scales"].neg_(), "not positive"),
    (lambda t, j, m: t["scale_runs"].mul_(1 << 20), "not as many"),
    (lambda t, j, m: t["scale_runs"].neg_(), "not positive"),
    (lambda t, j, m: t["value_scales"].neg_(), "not positive"),
    (lambda t, j, m: t.update(value_scales=torch.ones(())), "another shape"),
    (lambda t, j, m: t.update(value_zero_points=torch.zeros(3).byte()), "another shape"),
    (lambda t, j, m: t["fp32"].fill_(float("inf")), "NaN or infinite"),
    (lambda t, j, m: m.update(format="else"), "without its mark"),
    (lambda t, j, m: m.update(version="9"), "version 9"),
    (lambda t, j, m: j.pop("graph"), "graph"),
    (lambda t, j, m: j.update(graph=j["graph"] * 600), "too many operations"),
    (lambda t, j, m: j.update(graph=[]), "without operations"),
    (lambda t, j, m: j["graph"].reverse(), "not computed before"),
    (_operation("stem", kind="exec"), "unknown kind"),
    (_operation("stem", inputs=["nobody"]), "not computed before"),
    (_operation("stem", stride=[0, 0]), "damaged"),
    (_operation("stem", stride="fast"), "damaged"),
    (_operation("stem", groups=7), "damaged"),
    (_operation("depthwise", groups=1), "damaged"),
    (_operation("stem", dilation=[-1, 1]), "damaged"),
    (lambda t, j, m: j.update(affine=[1]), "not fit"),
    (_operation("stem", padding=[1 << 40, 1]), "damaged"),
    (_operation("stem", padding=[1 << 14, 1 << 14]), "damaged"),
    (_operation("hardswish", kind="pad", padding=[1 << 14] * 4), "damaged"),
    (_operation("x", shape=[3, 1 << 20, 1 << 20]), "damaged"),
    (_operation("x", shape=[3, -12, 12]), "no positive number"),
    (_operation("x", shape=[4, 12, 12]), "another number of channels"),
    (_operation("cat", inputs=["x", "stem"]), "damaged"),
    (lambda t, j, m: j["shapes"].__setitem__(0, [1 << 20, 1 << 20]), "damaged"),
    (lambda t, j, m: j["shapes"].__setitem__(0, [8, 3, True, 3]), "no positive number"),
    (lambda t, j, m: j["shapes"].pop(), "damaged"),
    (lambda t, j, m: j.update(affine=[8]), "damaged"),
    (lambda t, j, m: j.update(classes=["a", "b"]), "another number of logits"),
    (lambda t, j, m: j.update(classes=[1, 2, 3, 4, 5]), "class names that are no text"),
    (lambda t, j, m: j.update(mean=["a", "b", "c"]), "no numbers"),
    (lambda t, j, m: j.update(std=[1.0]), "no numbers"),
    (lambda t, j, m: j.update(std=[1.0, 0.0, 1.0]), "no numbers"),
    (lambda t, j, m: j.update(dense=["nobody"]), "dense layers"),
    (lambda t, j, m: j.update(settings={}), "settings"),
    (_settings(engine="no"), "no INT8 model is made with"),
    (_settings(engine=["fbgemm"]), "no INT8 model is made with"),
    (_settings(fp32_layers=["conv9"]), "FP32 layers"),
    (_settings(fp32_layers=[]), "fp32"),
]


def test_forged_files_are_refused_in_one_line(saved, tmp_path):
    path = tmp_path / "forged.safetensors"
    for change, message in FORGERIES:
        path.write_bytes(saved.read_bytes())
        rewrite(path, change)
        with pytest.raises(UserError, match=message) as refused:
            read_int8(path)
        assert "\n" not in str(refused.value)


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_does(saved, tmp_path):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(saved.read_bytes())

    def explode(tensors, fields, metadata):
        bomb = zlib.compress(b"[" * (1 << 28))
        tensors["network"] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)

    rewrite(path, explode)
    tracemalloc.start()
    with pytest.raises(UserError, match="too long"):
        read_int8(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_a_checksum_that_differs_is_told(saved, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(saved.read_bytes())
    rewrite(path, lambda t, j, m: t["biases"].add_(1), checksum=False)
    with pytest.raises(UserError, match="checksum differs"):
        read_int8(path)


@pytest.mark.parametrize(
    "content", [None, b"", b"\x80\x02}q\x00.", b"<!DOCTYPE html>", b"PK\x03\x04"]
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert not is_int8_file(path)
    with pytest.raises(UserError, match=r"bad\.safetensors: "):
        read_int8(path)
