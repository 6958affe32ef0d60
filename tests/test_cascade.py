"""What the cascade counts; that it gives FP32's predictions is shown in test_pruning_scan.py."""

from common.cascade import Recomputation


def test_recomputation_adds_up():
    total = Recomputation(10, 3, 1, 0.2)
    total.add(Recomputation(5, 1, 1, 0.1))
    assert total == Recomputation(15, 4, 2, 0.2)
