"""Two thousand random set-ups with a fault in each: a finite model, and a step, a documented skip or a clear error."""

from __future__ import annotations

from collections import Counter

import fuzz_cases
import pytest

CASES, CHUNK, QUICK = 2000, 50, 8
CHUNKS = [
    pytest.param(range(first, first + CHUNK), marks=[pytest.mark.slow] if first >= QUICK * CHUNK else [], id=str(first))
    for first in range(0, CASES, CHUNK)
]


@pytest.mark.parametrize("numbers", CHUNKS)
def test_every_case_ends_in_a_finite_model_and_a_step_a_skip_or_a_clear_error(numbers):
    """What each step is held to stands in `fuzz_cases.Run.judged`."""
    kinds: Counter[str] = Counter()
    for number in numbers:
        _, outcomes = fuzz_cases.run(number)
        kinds.update(outcome.split(":")[0] for outcome in outcomes)
    assert kinds["stepped"] > 0.4 * kinds.total()  # it is no test of errors alone
    assert kinds["rejected"] and len(kinds) >= 4


def test_a_number_gives_always_the_same_case():
    assert fuzz_cases.run(17) == fuzz_cases.run(17)
    assert len({fuzz_cases.draw(n).fault for n in range(CASES)}) == len(set(fuzz_cases.FAULTS))
    seen = [fuzz_cases.draw(n) for n in range(CASES)]
    for axis, values in (("likelihood", fuzz_cases.LIKELIHOODS), ("structure", fuzz_cases.STRUCTURES)):
        for search in fuzz_cases.SEARCHES:
            assert {getattr(s, axis) for s in seen if s.search == search} == set(values)
