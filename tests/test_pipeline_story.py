"""pipeline/story.py: what it advises."""

from __future__ import annotations

import pytest

from pipeline.story import advise


def answer(name: str, file_bytes: int, drop: float, median_ms: float, **changed: object) -> dict:
    return {
        "name": name, "file": f"{name}.safetensors", "within_budget": True, "size_ratio": 50.0,
        "size_ratio_given": 25.0, "file_bytes": file_bytes,
        "accuracy": {"total": 1000},
        "comparison": {"drop": drop, "ci95": [drop - 0.004, drop + 0.004]},
        "latency": [{"batch_size": 32, "median_ms": median_ms, "noisy": False}],
        "speedup": [
            {"batch_size": 1, "over_fp32": 6.0, "over_int8": 0.95, "noisy": False},
            {"batch_size": 32, "over_fp32": 8.0, "over_int8": 1.57, "noisy": False},
        ],
    } | changed  # fmt: skip


def advised(*answers: dict, coded: bool = False, max_drop: float = 0.01) -> list[str]:
    return advise({
        "answers": answers, "weights": {"coded": coded, "size_bytes": 15_000},
        "models": [{"name": "fp32", "size_bytes": 30_000}, {"name": "int8"}],
        "budget": {"max_drop": max_drop},
    })  # fmt: skip


@pytest.mark.parametrize(("coded", "network"), [(False, "dense INT8"), (True, "INT8")])
def test_the_speed_of_what_to_ship_is_told_at_every_batch_size(coded, network):
    (ship,) = advised(answer("both", 600, 0.002, 2.0), coded=coded)
    assert ship.startswith("Ship both.safetensors. It is ")
    assert "25.0× smaller than the given file" in ship
    assert f"as fast as {network}: 0.95× at batch 1, 1.57× at batch 32" in ship


def test_both_is_shipped_and_compared_with_the_others():
    ship, *_ = advised(
        answer("size", 500, 0.004, 3.0), answer("speed", 4000, 0.001, 1.6),
        answer("both", 600, 0.002, 2.0),
    )  # fmt: skip
    assert ship.startswith(
        "Ship both.safetensors: it is small and fast at once, with 1.20 times the bytes of "
        "size.safetensors and 1.25 times "
        "the time of speed.safetensors at batch 32."
    )


def test_an_answer_is_not_compared_with_itself():
    ship, *_ = advised(answer("size", 600, 0.002, 2.0), answer("both", 600, 0.002, 2.0))
    assert ship.startswith(
        "Ship both.safetensors: it is small and fast at once, with no more bytes than the smallest"
    )


def test_what_is_smaller_and_better_is_shipped():
    ship, *_ = advised(answer("size", 500, 0.001, 3.0), answer("both", 600, 0.002, 2.0))
    assert ship.startswith("Ship size.safetensors: it is smaller than both.safetensors and loses")


def test_what_few_images_leave_open_is_told():
    sure, unsure = answer("size", 500, 0.004, 3.0), answer("both", 600, 0.008, 2.0)
    ship, left_open = advised(sure, unsure)
    assert ship.startswith("Ship size.safetensors: ")
    assert left_open == (
        "both: on 1,000 images a loss of up to 1.20 points cannot be excluded, more than the "
        "budget. More test images would tell."
    )
    ship, _ = advised(unsure)
    assert ship.startswith("Ship both.safetensors (not proven to be within the budget). It is ")


def test_what_is_over_the_budget_is_not_shipped():
    over = answer("size", 500, 0.02, 3.0, within_budget=False)
    told = ["size: not within the budget; size.safetensors is the nearest found."]
    assert advised(over) == told
    first, ship, *_ = advised(over, answer("both", 600, 0.002, 2.0))
    assert [first] == told
    assert ship.startswith("Ship both.safetensors: it is the only answer within the budget.")
