"""A pruned network's two looks: what bf16 leaves in doubt, FP32 decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.evaluate import predict
from pruning.classify import BATCH_SIZE, Classifier

COUNT = 2 * BATCH_SIZE + 7


@pytest.mark.parametrize("fast", [False, True])
def test_it_classifies_as_plain_fp32_does(tiny_model, random_images, fast):
    test = random_images(COUNT)
    expected = predict(tiny_model, test, 16) == test.labels
    found = Classifier(tiny_model, test.images, fast).find_correct(test)
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)
    assert 0 < int(found.sum()) < COUNT  # else all agree by chance


def test_close_cases_are_those_within_the_bound(tiny_model, random_images):
    """Where bf16 always says 9, other classes come from FP32 alone."""
    test = random_images(COUNT)
    test.labels[:] = predict(tiny_model, test, 16)
    classifier = Classifier(tiny_model, test.images, fast=True)
    always_nine = classifier._fast.linear_bias + torch.arange(10) * 100.0
    classifier._fast = replace(classifier._fast, linear_bias=always_nine)
    correct_by_bound = []
    for bound in (0.0, 100.0, 1e4):
        classifier._bound = torch.tensor(bound)
        correct_by_bound.append(int(classifier.find_correct(test).sum()))
    nines = int((test.labels == 9).sum())
    assert correct_by_bound[0] == nines
    assert correct_by_bound[0] <= correct_by_bound[1] < correct_by_bound[2] == COUNT
