"""Networks that are kept while a run is unfinished."""

from __future__ import annotations

import torch

from pipeline.store import Store


def test_a_network_is_made_once_and_again_where_its_file_is_damaged(tmp_path, tiny_model):
    store, made = Store(tmp_path), []

    def make():
        made.append(1)
        return tiny_model

    _, path = store.slim("half", make)
    found, again = store.slim("half", make)
    assert (made, again) == ([1], path)
    path.write_bytes(path.read_bytes()[:1000])
    mended, _ = store.slim("half", make)
    assert made == [1, 1]
    for model in (found, mended):
        assert torch.equal(model.conv1.weight, tiny_model.conv1.weight)
