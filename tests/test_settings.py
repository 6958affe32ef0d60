"""Settings of the quantization, as a run chooses them and as a file tells them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantization.settings import ENGINES, OBSERVERS, Settings, parse_settings

REPOSITORY = Path(__file__).resolve().parents[1]
FIELDS = asdict(Settings())


@settings(max_examples=10)
@given(
    st.builds(
        Settings,
        engine=st.sampled_from(ENGINES),
        reduce_range=st.booleans(),
        observer=st.sampled_from(OBSERVERS),
        fp32_layers=st.sets(st.sampled_from(["conv1", "layer2.0.shortcut.0", "linear"])).map(tuple),
    )
)
def test_what_was_written_is_what_is_read(chosen):
    assert parse_settings(asdict(chosen)) == chosen
    assert parse_settings(json.loads(json.dumps(asdict(chosen)))) == chosen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "incomplete or unknown"),
        ([*FIELDS], "incomplete or unknown"),
        ({}, "incomplete or unknown"),
        (FIELDS | {"bits": 4}, "incomplete or unknown"),
        (FIELDS | {"engine": "abacus"}, "no INT8 model"),
        (FIELDS | {"engine": ["fbgemm"]}, "no INT8 model"),
        (FIELDS | {"observer": None}, "no INT8 model"),
        (FIELDS | {"reduce_range": 1}, "no INT8 model"),
        (FIELDS | {"fp32_layers": "conv1"}, "no INT8 model"),
        (FIELDS | {"fp32_layers": [{}]}, "no INT8 model"),
    ],
)
def test_what_no_model_is_made_with_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(fields)


def test_the_choices_come_without_torch():
    code = "import sys, quantization.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
