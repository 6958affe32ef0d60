"""The two looks: what bf16 leaves in doubt, FP32 decides.

That branches get FP32's predictions is shown in test_pruning_scan.py.
"""

from dataclasses import replace

import pytest
import torch

from common.measure.evaluate import predict
from common.network.cascade import SAFETY_FACTOR, Fp32Recheck, bounds_of, decide
from common.network.execution import Network
from common.network.tracing import trace_network
from pruning.together import search
from pruning.together.search import BATCH_SIZE, make_classifier

COUNT = 2 * BATCH_SIZE + 7


def test_rechecks_add_up():
    total = Fp32Recheck(10, 3, 1, 0.2)
    total.add(Fp32Recheck(5, 1, 1, 0.1))
    assert total == Fp32Recheck(15, 4, 2, 0.2)


@pytest.mark.parametrize(("largest", "warns"), [(0.0, False), (0.6, False), (0.7, True)])
def test_a_change_near_the_bound_is_warned_of(largest, warns, caplog):
    Fp32Recheck(10, 3, 1, largest).warn_if_near()
    assert ("some beyond may be wrong" in caplog.text) == warns


def test_what_is_within_the_bound_and_nothing_else_is_looked_at_again():
    fast = torch.tensor([[[0.0, 0.9, -5.0], [0.0, 1.1, -5.0]]])
    record, looked_at = Fp32Recheck(), []

    def look_again(close):
        looked_at.append(close.tolist())
        return torch.tensor([0])

    found = decide(fast, torch.ones(1), look_again, record)
    assert (looked_at, found.tolist()) == ([[[True, False]]], [[0, 1]])
    assert record == Fp32Recheck(2, 1, 1, pytest.approx(0.9))


def test_an_error_that_all_logits_share_does_not_widen_the_bound():
    exact = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]])
    errors = torch.tensor([[[8.0, 8.0], [4.0, 4.0]], [[8.0, 8.0], [4.0, 3.5]]])
    bounds = bounds_of(exact + errors, exact)
    assert bounds.tolist() == [pytest.approx(0), SAFETY_FACTOR * 0.5]


@pytest.mark.parametrize("fast", [False, True])
def test_it_classifies_as_plain_fp32_does(tiny_model, random_images, fast):
    test, record = random_images(COUNT), Fp32Recheck()
    expected = predict(tiny_model, test, 16) == test.labels
    found = make_classifier(trace_network(tiny_model, test.shape), test, fast, record)(test)
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)
    assert 0 < int(found.sum()) < COUNT  # else all agree by chance
    assert record.predictions == (COUNT if fast else 0)


def test_close_cases_are_those_within_the_bound(tiny_model, random_images, monkeypatch):
    """Where bf16 always says 9, other classes come from FP32 alone, and the record says so."""
    test, record = random_images(COUNT), Fp32Recheck()
    test.labels[:] = predict(tiny_model, test, 16)
    network = trace_network(tiny_model, test.shape)
    linear = network.layers["linear"]
    always_nine = replace(linear, bias=linear.bias + torch.arange(10) * 100.0)
    fast = network.to(torch.bfloat16).with_layers({"linear": always_nine})
    monkeypatch.setattr(Network, "to", lambda *_: fast)
    correct_by_bound = []
    for bound in (1e-9, 99.0, 1e4):
        monkeypatch.setattr(search, "bounds_of", lambda *_, bound=bound: torch.tensor([bound]))
        classifier = make_classifier(network, test, True, record)
        correct_by_bound.append(int(classifier(test).sum()))
    nines = int((test.labels == 9).sum())
    assert correct_by_bound[0] == nines
    assert correct_by_bound[0] <= correct_by_bound[1] < correct_by_bound[2] == COUNT
    assert record.predictions == 3 * COUNT
    assert record.changed >= COUNT - nines
    assert record.recomputed >= record.changed
    assert 0 < record.largest_change < 1
