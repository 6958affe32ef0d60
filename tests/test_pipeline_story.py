"""pipeline/story.py: what it advises."""

from __future__ import annotations

from pipeline.story import advise


def test_the_speed_of_what_to_ship_is_told_at_every_batch_size():
    speedup = [
        {"batch_size": 1, "over_fp32": 6.0, "over_int8": 0.95},
        {"batch_size": 32, "over_fp32": 8.0, "over_int8": 1.57},
    ]
    answer = {
        "name": "both", "file": "a.safetensors", "within_budget": True, "size_ratio": 50.0,
        "size_ratio_given": 25.0,
        "speedup": speedup,
    }  # fmt: skip
    for coded, network in ((False, "dense INT8"), (True, "INT8")):
        ship, _ = advise({"answers": [answer], "weights": {"coded": coded}})
        assert "25.0× smaller than the given file" in ship
        assert f"as fast as {network}: 0.95× at batch 1, 1.57× at batch 32" in ship
