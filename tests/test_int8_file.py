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
from safetensors.numpy import load

from common.command.cli import UserError
from common.files import entropy
from common.network.tracing import trace_network
from quantization.files import int8_file
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
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        for part in ("weight", "scales", "bias") if layer.is_int8 else ("weight", "bias"):
            left, right = getattr(layer, part), getattr(two.layers[name], part)
            assert torch.equal(left, right), (name, part)
            assert left.dtype == right.dtype
        assert layer.is_int8 == two.layers[name].is_int8


def rewrite(path, change, checksum=True):
    """Write the file anew with its tensors, JSON and metadata changed, as a forger would."""
    tensors, metadata = load(path.read_bytes()), load_metadata(path.read_bytes())
    digits = metadata["sha256"]
    fields = json.loads(zlib.decompress(tensors["network"].tobytes()))
    before = json.dumps(fields)
    change(tensors, fields, metadata)
    if json.dumps(fields) != before:
        tensors["network"] = as_bytes(zlib.compress(json.dumps(fields).encode()))
    content = int8_file.seal(tensors, metadata["format"], metadata["version"])
    if not checksum:
        content = content.replace(load_metadata(content)["sha256"].encode(), digits.encode())
    path.write_bytes(content)


def load_metadata(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def as_bytes(content):
    return np.frombuffer(content, np.uint8)


def fill(name, value):
    return lambda t, j, m: t.update({name: np.full_like(t[name], value)})


def scale(name, factor):
    return lambda t, j, m: t.update({name: t[name] * t[name].dtype.type(factor)})


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
    monkeypatch.setattr(entropy, "MIN_DENSE_WEIGHTS", 100)
    network = convert(observation, Settings())
    network.layers["hidden"].weight[:] = 0
    network.layers["hidden"].weight[3, 5] = -128
    path = tmp_path / "model.safetensors"
    save_int8(network, path)
    fields = json.loads(zlib.decompress(load(path.read_bytes())["network"].tobytes()))
    assert {storage for storage, _ in fields["weights"]} == {"sparse", "dense", "fp32"}
    assert_same(read_int8(path), network)


def test_a_network_of_fp32_layers_has_no_levels(observation, tmp_path):
    network = convert(observation, Settings(fp32_layers=observation.network.graph.layers))
    path = tmp_path / "model.safetensors"
    save_int8(network, path)
    assert_same(read_int8(path), network)


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


def _operation(which, **fields):
    def change(tensors, json_fields, metadata):
        next(o for o in json_fields["graph"] if o["name"] == which).update(fields)

    return change


def _settings(**fields):
    return lambda t, j, m: j["settings"].update(fields)


def _range_of(name, index):
    def change(tensors, fields, metadata):
        names = [operation["name"] for operation in fields["graph"]]
        fields["ranges"][names.index(name)] = index

    return change


FORGERIES = [
    (lambda t, j, m: t.update(levels=np.zeros(4, np.uint8)), "cut off"),
    (lambda t, j, m: t.update(levels=np.zeros(1 << 20, np.uint8)), "coded levels"),
    (lambda t, j, m: t.update(levels=t["levels"].astype(np.float32)), "levels has another"),
    (lambda t, j, m: t.update(network=t["network"].astype(np.float32)), "network has another"),
    (lambda t, j, m: t.update(network=t["network"][:50]), "cut off"),
    (lambda t, j, m: t.update(network=as_bytes(zlib.compress(b"[" * 100_000))), "damaged"),
    (lambda t, j, m: t.update(levels=t["levels"][:-4]), "damaged|more coded"),
    (lambda t, j, m: t.pop("levels"), "cut off"),
    (lambda t, j, m: t.pop("biases"), "biases"),
    (lambda t, j, m: t.update(evil=np.zeros(1)), "evil is unexpected"),
    (lambda t, j, m: t.update(biases=np.zeros(9, np.float32)), "another shape"),
    (fill("biases", np.nan), "NaN"),
    (fill("scales", np.nan), "NaN"),
    (scale("scales", -1), "not positive"),
    (scale("scale_runs", 1 << 20), "not as many"),
    (scale("scale_runs", -1), "not positive"),
    (scale("value_scales", -1), "not positive"),
    (lambda t, j, m: t.update(value_scales=np.ones((), np.float32)), "another shape"),
    (lambda t, j, m: t.update(value_zero_points=np.zeros(3, np.uint8)), "damaged"),
    (fill("fp32", np.inf), "NaN or infinite"),
    (lambda t, j, m: m.update(format="else"), "without its mark"),
    (lambda t, j, m: m.update(version="9"), "version 9"),
    (lambda t, j, m: j.pop("graph"), "graph"),
    (lambda t, j, m: j.update(graph=j["graph"] * 600), "too many operations"),
    (lambda t, j, m: j.update(graph=[]), "or none"),
    (lambda t, j, m: j["graph"].reverse(), "damaged"),
    (lambda t, j, m: j["graph"].insert(1, j["graph"].pop()), "damaged"),
    (_operation("hardswish", name="stem"), "damaged"),
    (_operation("hardswish", kind="exec"), "exec"),
    (_operation("stem", inputs=["nobody"]), "damaged"),
    (_operation("stem", stride=[0, 0]), "no positive number"),
    (_operation("stem", stride="fast"), "damaged"),
    (_operation("stem", groups=7), "damaged"),
    (_operation("depthwise", groups=1), "damaged"),
    (_operation("stem", dilation=[-1, 1]), "no positive number"),
    (_operation("stem", padding=[1 << 40, 1]), "far too large"),
    (_operation("stem", padding=[1 << 14, 1 << 14]), "damaged"),
    (_operation("hardswish", kind="pad", padding=[1 << 14] * 4), "damaged"),
    (_operation("x", shape=[3, 1 << 20, 1 << 20]), "damaged"),
    (_operation("x", shape=[3, -12, 12]), "no positive number"),
    (_operation("x", shape=[4, 12, 12]), "another number of channels"),
    (_operation("cat", inputs=["x", "stem"]), "damaged"),
    (lambda t, j, m: j["weights"][0].__setitem__(1, [1 << 20, 1 << 20]), "damaged"),
    (lambda t, j, m: j["weights"][0].__setitem__(1, [8, 3, True, 3]), "no positive number"),
    (lambda t, j, m: j["weights"][0].__setitem__(0, "zip"), "unknown way"),
    (lambda t, j, m: j["weights"].pop(), "damaged"),
    (lambda t, j, m: j["ranges"].pop(), "damaged"),
    (lambda t, j, m: j["ranges"].__setitem__(1, 99), "damaged"),
    (lambda t, j, m: j["ranges"].__setitem__(0, None), "damaged"),
    (lambda t, j, m: j.update(classes=["a", "b"]), "damaged"),
    (lambda t, j, m: j.update(classes=[1, 2, 3, 4, 5]), "class names that are no text"),
    (lambda t, j, m: j.update(mean=["a", "b", "c"]), "no number"),
    (lambda t, j, m: j.update(std=[1.0]), "another number of channels"),
    (lambda t, j, m: j.update(std=[1.0, 0.0, 1.0]), "not positive"),
    (lambda t, j, m: j.update(channel_order="gbr"), "order of channels"),
    (lambda t, j, m: j.update(resize=-1), "no positive number"),
]
# What the runtime does not look at.
FORGED_FOR_TORCH = [
    (lambda t, j, m: j.update(settings={}), "settings"),
    (_settings(engine="no"), "no INT8 model is made with"),
    (_settings(engine=["fbgemm"]), "no INT8 model is made with"),
    (_settings(fp32_layers=["conv9"]), "FP32 layers"),
    (_settings(fp32_layers=[]), "FP32 layers"),
    (lambda t, j, m: j["ranges"].__setitem__(-1, None), "ranges of other values"),
    (_range_of("max_pool2d", 0), "only moved"),
]


def test_forged_files_are_refused_in_one_line(saved, tmp_path):
    path = tmp_path / "forged.safetensors"
    for change, message in FORGERIES + FORGED_FOR_TORCH:
        path.write_bytes(saved.read_bytes())
        rewrite(path, change)
        with pytest.raises(UserError, match=message) as refused:
            read_int8(path)
        assert "\n" not in str(refused.value)


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_does(saved, tmp_path):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(saved.read_bytes())

    def explode(tensors, fields, metadata):
        tensors["network"] = as_bytes(zlib.compress(b"[" * (1 << 28)))

    rewrite(path, explode)
    tracemalloc.start()
    with pytest.raises(UserError, match="too long"):
        read_int8(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_a_checksum_that_differs_is_told(saved, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(saved.read_bytes())
    rewrite(path, fill("biases", 1), checksum=False)
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
