"""common/search/trials.py: few trials, the strongest that passes."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from common.search.budget import Verdict
from common.search.trials import Range, Trial, nearest, run_trials, strongest


def make(strength, spare):
    return Trial(strength, Verdict(None, None, spare))


WHERE = Range(start=1.3, least=0.25, most=10.0, trials=8)


@given(limit=st.floats(0.15, 20.0), slope=st.floats(0.5, 5.0), stride=st.floats(1.2, 2.5))
def test_the_limit_is_found_where_the_range_holds_it(limit, slope, stride):
    """Spare falls with strength, and is zero at the limit."""
    where = replace(WHERE, stride=stride)
    made = run_trials(lambda s: make(s, (limit / s) ** slope - 1), where)
    best = strongest(made)
    assert len(made) <= where.trials * (1 if strongest(made[:-1]) else 2)
    assert all(where.least <= trial.strength <= where.most for trial in made)
    if limit >= where.most:
        assert best.strength == where.most or len(made) >= where.trials
    elif limit >= 1.05 * where.least:
        assert best is not None
        assert limit / 1.35 < best.strength <= limit * (1 + 1e-9) or len(made) >= where.trials
    elif limit < where.least:
        assert best is None
        assert nearest(made).strength == min(trial.strength for trial in made)


@given(st.lists(st.floats(-1, 1), min_size=16, max_size=16))
def test_noise_never_makes_it_try_the_same_twice(spares):
    """An accuracy is no monotone function of the strength."""
    values = iter(spares)
    made = run_trials(lambda s: make(s, next(values)), WHERE)
    strengths = sorted(trial.strength for trial in made)
    assert all(b / a > 0.999 * WHERE.resolution for a, b in itertools.pairwise(strengths))
    if best := strongest(made):
        assert best.spare >= 0
        assert all(t.spare < 0 for t in made if t.strength > best.strength)


def test_it_goes_on_where_nothing_has_passed():
    few = replace(WHERE, trials=2)
    made = run_trials(lambda s: make(s, 0.8 - s), few)
    assert [trial.spare >= 0 for trial in made] == [False, False, True]
    assert len(run_trials(lambda s: make(s, -1.0), few)) == 4


def test_it_closes_in_on_a_steep_edge():
    made = run_trials(lambda s: make(s, 2 - s), WHERE)
    assert abs(strongest(made).strength - 2) < 0.12


def test_nothing_is_left_to_try_where_the_range_is_one_strength():
    """A network as narrow as can be."""
    for spare in (1.0, -1.0):
        assert len(run_trials(lambda s, spare=spare: make(s, spare), Range(1.0, 1.03, 1.0))) == 1


def test_a_search_that_ends_at_its_limit_says_so(caplog):
    caplog.set_level("INFO", "compression")
    run_trials(lambda s: make(s, 2 - s), replace(WHERE, trials=2))
    assert "the limit of 2 networks is reached" in caplog.text
    caplog.clear()
    run_trials(lambda s: make(s, 2 - s), replace(WHERE, trials=20))
    assert not caplog.text
