"""Malformed inputs of every kind end right, in one clear line, or are left out and named."""

import pytest
from fixtures.malformed import FAULTS, KEPT, KINDS, Attempt, Edit, Kind, Outcome, judge
from hypothesis import HealthCheck, Phase, given, settings

CASES = [(name, change) for name, changes in KEPT.items() for change in changes]


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """Keep what the readers cache out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_input_is_read_right_or_refused_by_name(name):
    kind = KINDS[name]

    @settings(
        max_examples=40,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.changes)
    def attempt(change):
        judgement = judge(kind, change)
        assert judgement.outcome not in FAULTS, f"{judgement.outcome.value}: {change!r}\n{judgement.detail}"

    attempt()


@pytest.mark.parametrize(("name", "change"), CASES, ids=[name for name, _ in CASES])
def test_an_input_that_once_failed_is_read_right_or_refused_by_name(name, change):
    judgement = judge(KINDS[name], change)
    assert judgement.outcome not in FAULTS, f"{judgement.outcome.value}\n{judgement.detail}"


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("read", "complaint", "outcome"),
    [
        (lambda: 1, None, Outcome.RIGHT),
        (lambda: 1, Outcome.SKIPPED, Outcome.SKIPPED),
        (lambda: 1, "it is another number", Outcome.SILENT),
        (lambda: _raise(ValueError("a.json is damaged")), None, Outcome.CLEAR_LINE),
        (lambda: _raise(ValueError("damaged")), None, Outcome.UNPLACED_LINE),
        (lambda: _raise(KeyError("a.json")), None, Outcome.TRACEBACK),
        (lambda: [None for _ in iter(int, 1)], None, Outcome.HANG),
    ],
)
def test_the_judge_tells_the_outcomes_apart(read, complaint, outcome):
    kind = Kind("", None, lambda change, folder: Attempt(read, ("a.json",), lambda result: complaint))
    assert judge(kind, Edit(()), seconds=0.3).outcome is outcome
