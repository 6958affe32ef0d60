"""All images through a network, an operation at a time."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, build

from common.fitting import walk as module
from common.fitting.walk import Walk, mirrored_pairs, peak_bytes_per_image
from common.network.tracing import trace_network


@pytest.mark.parametrize("make", NETWORKS)
def test_a_walk_ends_where_the_network_does(random_images, make):
    images = random_images(20)
    network = trace_network(build(make, images), images.shape)
    pixels = images.normalize(images.images)
    batches = list(pixels.split(8))
    before = pixels.clone()
    for storage, tolerance in ((None, 1e-5), (torch.float16, 3e-3)):
        walk = Walk(network, batches, network.graph, storage)
        for operation in network.graph.operations[1:]:
            walk.step(operation.name)
        found = torch.cat(walk.batches(network.graph.output))
        expected = network(pixels)
        assert (found - expected).abs().max() < tolerance * expected.abs().max()
        assert walk._values.keys() == {network.graph.output}  # all else is freed
    assert torch.equal(pixels, before)


def test_another_layer_may_take_a_layers_place(random_images):
    images = random_images(4)
    network = trace_network(build(NETWORKS[1], images), images.shape)
    pixels = images.normalize(images.images)
    name = network.graph.layers[1]
    other = network.layers[name].masked(torch.zeros_like(network.layers[name].weight).bool())
    walk = Walk(network, [pixels], network.graph)
    for operation in network.graph.operations[1:]:
        walk.step(operation.name, other if operation.name == name else None)
    expected = network.with_layers({name: other})(pixels)
    torch.testing.assert_close(walk.batches(network.graph.output)[0], expected)


@pytest.mark.parametrize("make", NETWORKS)
def test_a_walk_takes_the_memory_that_is_foretold(random_images, make):
    images = random_images(2)
    network = trace_network(build(make, images), images.shape)
    walk = Walk(network, [images.normalize(images.images)], network.graph, torch.float16)
    most = 0
    for operation in network.graph.operations[1:]:
        before = sum(batch.numel() for value in walk._values.values() for batch in value)
        walk.step(operation.name)
        most = max(most, before + walk.batches(operation.name)[0].numel())
    assert 2 * most == 2 * peak_bytes_per_image(network, 2)


def test_no_more_images_walk_than_memory_allows(random_images, monkeypatch, caplog):
    images = random_images(20)
    network = trace_network(build(NETWORKS[0], images), images.shape)
    caplog.set_level("INFO")
    pairs = mirrored_pairs(images, [network, network], 4).images
    assert torch.equal(pairs[::2], images.images)
    assert torch.equal(pairs[1::2], images.images.flip(3))
    assert not caplog.records
    peak = peak_bytes_per_image(network, 4)
    monkeypatch.setattr(module, "MEMORY_BYTES", 30 * peak)
    assert torch.equal(mirrored_pairs(images, [network, network], 4).images, pairs[:15])
    assert "15 of 40 images are used, mirror images among them" in caplog.text
    monkeypatch.setattr(module, "MEMORY_BYTES", 5 * peak)
    assert len(mirrored_pairs(images, [network], 2)) == 10
    monkeypatch.setattr(module, "MEMORY_BYTES", 1)
    assert len(mirrored_pairs(images, [network], 2)) == 1
