"""pipeline/search.py: few trials, the strongest that passes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.search import Range, nearest, run_trials, strongest


@dataclass(frozen=True)
class Trial:
    kept: float
    spare: float


WHERE = Range(start=0.75, least=0.1, most=4.0, trials=8)


@given(limit=st.floats(0.05, 6.0), slope=st.floats(0.5, 5.0))
def test_the_limit_is_found_where_the_range_holds_it(limit, slope):
    """Spare grows with what is kept, and is zero at the limit."""
    made = run_trials(lambda s: Trial(s, (s / limit) ** slope - 1), WHERE)
    best = strongest(made)
    assert len(made) <= WHERE.trials * (1 if best else 2)
    assert all(WHERE.least <= trial.kept <= WHERE.most for trial in made)
    if limit <= WHERE.least:
        assert best.kept == WHERE.least or len(made) == WHERE.trials
    elif limit <= 0.95 * WHERE.most:
        assert best is not None
        assert limit <= best.kept < 1.35 * limit or len(made) == WHERE.trials
    elif limit > WHERE.most:
        assert best is None
        assert nearest(made).kept == max(trial.kept for trial in made)


@given(st.lists(st.floats(-1, 1), min_size=16, max_size=16))
def test_noise_never_makes_it_try_the_same_twice(spares):
    """An accuracy is no monotone function of what is kept."""
    values = iter(spares)
    made = run_trials(lambda s: Trial(s, next(values)), WHERE)
    kept = sorted(trial.kept for trial in made)
    assert all(b / a > 0.999 * WHERE.resolution for a, b in itertools.pairwise(kept))
    if best := strongest(made):
        assert best.spare >= 0
        assert all(t.spare < 0 for t in made if t.kept < best.kept)


def test_it_goes_on_where_nothing_has_passed():
    few = replace(WHERE, trials=2)
    made = run_trials(lambda s: Trial(s, s - 1.2), few)
    assert [trial.spare >= 0 for trial in made] == [False, False, True]
    assert len(run_trials(lambda s: Trial(s, -1.0), few)) == 4


def test_it_closes_in_on_a_steep_edge():
    made = run_trials(lambda s: Trial(s, s - 0.5), WHERE)
    assert abs(strongest(made).kept - 0.5) < 0.03
