"""pipeline/tables.py: what it advises."""

from __future__ import annotations

from pipeline.tables import advice


def test_the_speed_of_what_to_ship_is_told_at_every_batch_size():
    speedup = [
        {"batch_size": 1, "over_fp32": 6.0, "over_int8": 0.95},
        {"batch_size": 32, "over_fp32": 8.0, "over_int8": 1.57},
    ]
    answer = {
        "name": "both", "file": "a.safetensors", "within_budget": True, "size_ratio": 50.0,
        "speedup": speedup,
    }  # fmt: skip
    lines = advice({"answers": [answer]})
    assert "     as fast as dense INT8: 0.95× at batch 1, 1.57× at batch 32" in lines
