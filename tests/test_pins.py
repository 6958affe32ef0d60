import json

import pytest
from record_pins import PINS, record


@pytest.mark.full
def test_bundled_results_are_those_recorded():
    known, found = json.loads(PINS.read_text()), record()
    assert found["channels"] == known["channels"]
    assert found["scan"] == known["scan"]
    assert found["int8"] == known["int8"]
