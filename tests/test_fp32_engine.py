"""FP32 at its best computes what the network computes."""

from __future__ import annotations

import pytest
import torch
from every_kind import EveryKind
from test_engines import Mobile, Residual

from common.network.tracing import trace_network
from quantization.int8.engines import fp32


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", [EveryKind, Residual, Mobile])
def test_packed_convolutions_give_the_same_logits(kind, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(fp32, "can_pack", lambda: False)
    torch.manual_seed(0)
    network = trace_network(kind().eval(), (3, 12, 12))
    run, images = fp32.fp32_runner(network), torch.randn(5, 3, 12, 12)
    for count in (5, 1, 8, 5):
        batch = images.repeat(2, 1, 1, 1)[:count]
        given = batch.clone()
        assert torch.allclose(run(batch), network(batch), atol=1e-5, rtol=1e-4)
        assert torch.equal(batch, given)
    assert not run(images.requires_grad_()).requires_grad
