"""Which engines this CPU has, which are used, and that using one leaves no trace."""

from __future__ import annotations

import contextlib
import json
import os
import threading

import pytest
import torch
from processes import run_fresh

from common.command import cli
from common.command.cli import UserError
from common.machine import device
from quantization.int8 import engines
from quantization.settings import ENGINES, Settings

CANDIDATES = engines.candidate_engines()


def test_an_engine_that_is_not_here_is_named_with_those_that_are():
    with pytest.raises(UserError, match=rf"no abacus engine .* it has: .*{CANDIDATES[0]}"):
        engines.choose_settings("abacus")


@pytest.mark.parametrize("saturating", [set(), {"fbgemm", "x86", "onednn"}])
def test_activations_have_seven_bits_where_sums_would_saturate(monkeypatch, saturating):
    monkeypatch.setattr(engines, "saturates", lambda engine: engine in saturating)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", [*ENGINES])
    reduced = {engine for engine in ENGINES if engines.choose_settings(engine).reduce_range}
    assert reduced == saturating
    assert engines.choose_settings("qnnpack", reduce_range="on").reduce_range
    assert engines.choose_settings("x86", "minmax", "off") == Settings("x86", False, "minmax")


PROBE = """
import json
from quantization.int8 import engines
print(json.dumps({name: engines.choose_settings(name).reduce_range for name in %r}))
"""


@pytest.mark.skipif("onednn" not in CANDIDATES, reason="no onednn engine on this CPU")
def test_kernels_that_saturate_are_found_by_what_they_compute():
    """oneDNN is told not to use VNNI; the CPU's flags stay as they are, and so does fbgemm."""
    limited = run_fresh("-c", PROBE % CANDIDATES, ONEDNN_MAX_CPU_ISA="AVX2")
    here = {name: engines.saturates(name) for name in CANDIDATES}
    oneself = {name: True for name in ("x86", "onednn") if name in CANDIDATES}
    assert json.loads(limited.stdout) == here | oneself


@pytest.mark.skipif(not device.has_vnni(), reason="sums saturate where the CPU has no VNNI")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="oneDNN is limited")
def test_no_sum_saturates_with_vnni():
    assert not any(map(engines.saturates, CANDIDATES))


def test_a_thread_waits_for_calls_on_another_engine_but_not_on_its_own():
    if len(CANDIDATES) < 2:
        pytest.skip("one engine on this CPU")
    events, own, other = [], CANDIDATES[0], CANDIDATES[1]

    def call(name):
        with engines.running_on(name):
            events.append((name, torch.backends.quantized.engine))

    with engines.running_on(own):
        with engines.running_on(own):  # a turn within a turn
            same, different = (threading.Thread(target=call, args=(n,)) for n in (own, other))
            same.start()
            same.join(10)
        different.start()
        different.join(0.2)
        assert events == [(own, own)]
    different.join(10)
    assert events == [(own, own), (other, other)]


def test_the_fastest_engine_is_the_last_candidate_and_none_is_told(monkeypatch):
    assert engines.fastest_engine() == CANDIDATES[-1]
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    for choose in (engines.fastest_engine, engines.default_engines):
        with pytest.raises(UserError, match="no INT8 engine"):
            choose()


def test_candidates_are_supported_and_qnnpack_only_alone():
    supported = torch.backends.quantized.supported_engines
    assert CANDIDATES
    assert set(CANDIDATES) <= set(supported) & set(ENGINES)
    assert "qnnpack" not in CANDIDATES or len(CANDIDATES) == 1


@pytest.mark.parametrize(
    ("supported", "expected"),
    [(["none", "qnnpack"], "qnnpack"), (["qnnpack", "onednn"], "qnnpack"), (["onednn"], "onednn"),
     (["qnnpack", "fbgemm", "x86"], "fbgemm")],
)  # fmt: skip
def test_where_there_is_no_fbgemm_one_line_says_what_is_used(
    supported, expected, monkeypatch, capsys
):
    cli.set_up_messages(quiet=False)
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", supported)
    assert engines.default_engines() == [expected]
    assert capsys.readouterr().err.count("\n") == (expected != "fbgemm")


def test_the_engine_is_restored_even_after_a_failure():
    before = torch.backends.quantized.engine
    with contextlib.suppress(KeyError), engines.quiet_torch(CANDIDATES[-1]):
        assert torch.backends.quantized.engine == CANDIDATES[-1]
        raise KeyError
    assert torch.backends.quantized.engine == before
