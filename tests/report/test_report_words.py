"""Sentences follow the numbers: winners, losses, ties and gaps in the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import report_samples as samples

from natgrad.report import words
from natgrad.report.series import Band
from natgrad.tasks.results import Comparison, Evaluation, Run


def race(finish: dict[str, list[tuple[int, float] | None]], target: float | None = 0.5) -> Comparison:
    """A comparison whose runs arrive at the given (step, seconds), one per seed, or never."""
    runs, seeds = [], tuple(range(max(len(v) for v in finish.values())))
    for name, arrivals in finish.items():
        for seed, arrival in enumerate(arrivals):
            points = [Evaluation(0, 0.0, 1.0, 1.0, 1.0)]
            if arrival:
                points.append(Evaluation(arrival[0], arrival[1], 0.4, 0.5, 0.3))
            runs.append(Run(name, seed, 0.1, False, (0.01,), (0.01,), (1.0,), (1e-3,), (1e-3,), tuple(points)))
    return samples.assembled(tuple(finish), seeds, runs, budget=10.0, target=target, tune=False)


def test_winners_by_steps_and_seconds_are_named_apart() -> None:
    text = words.summary(race({"kfac": [(10, 4.0), (12, 5.0)], "adamw": [(40, 2.0), (44, 2.2)]}))
    assert text[0].startswith("By steps, kfac was first: it reached the target, training loss 0.500")
    assert "after 11 steps (median of 2 seeds), against 42 steps of adamw (3.82 times as many)." in text[0]
    assert text[1].startswith("By seconds, adamw was first: it got there after 2.10 s")
    assert "against 4.50 s of kfac, the best natural gradient (2.14 times as long)." in text[1]


def test_a_natural_gradient_that_is_not_second_is_still_named() -> None:
    text = words.summary(race({"kfac": [(90, 9.0)], "adamw": [(40, 2.0)], "sgd": [(60, 3.0)]}))
    assert "the best natural gradient, kfac, took 90 steps (2.25 times as many)" in text[0]
    assert "the best natural gradient, kfac, took 9.00 s (4.50 times as long)" in text[1]


def test_a_winning_natural_gradient_is_held_against_the_best_other_method() -> None:
    text = words.summary(race({"kfac": [(20, 2.0)], "ekfac": [(16, 3.0)], "sgd": [(80, 5.0)]}))
    assert text[0].endswith(
        "against 20 steps of kfac (1.25 times as many); the best other method, sgd, took 80 steps (5.00 times as many)."
    )
    assert "the best other method, sgd, took 5.00 s (2.50 times as long)" in text[1]
    never = words.summary(race({"kfac": [(20, 2.0)], "ekfac": [(16, 3.0)], "sgd": [None]}))
    assert "no other method did." in never[0]


def test_overlapping_seeds_are_not_called_settled() -> None:
    close = words.summary(race({"kfac": [(10, 1.0), (30, 3.0)], "sgd": [(28, 4.0), (32, 5.0)]}))
    assert "overlap" in close[0]
    assert "overlap" not in close[1]


def test_missing_arrivals_are_said() -> None:
    text = " ".join(words.summary(race({"kfac": [None, None], "sgd": [(5, 1.0), (6, 1.0)]})))
    assert "no other optimizer did in most seeds" in text
    none = words.summary(race({"kfac": [None], "sgd": [None]}))
    assert none[0].startswith("No optimizer reached the target")


def test_one_seed_is_called_one_seed() -> None:
    assert "one seed only" in " ".join(words.summary(race({"kfac": [(1, 1.0)], "sgd": [(2, 2.0)]})))
    assert "one seed only" not in " ".join(words.summary(race({"kfac": [(1, 1.0)] * 2, "sgd": [(2, 2.0)] * 2})))


def test_without_target_final_losses_decide() -> None:
    text = words.summary(race({"kfac": [(9, 1.0)], "sgd": [None]}, target=None))
    assert text[0].startswith("kfac ended with the lowest training loss, 0.400, before sgd with 1.00")


def test_everything_failed_gives_the_first_reason() -> None:
    c = samples.comparison(("kfac",), (0,))
    assert "NaN at step 0" in words.summary(samples.failing(c, "kfac", at=0))[0]


def test_curve_caption_compares_where_all_have_data() -> None:
    bands = {
        "a": Band((0.0, 10.0), (4.0, 2.0), (4.0, 2.0), (4.0, 2.0)),
        "b": Band((0.0, 20.0), (4.0, 1.0), (4.0, 1.0), (4.0, 1.0)),
    }
    caption = words.curves(bands, "steps", "training loss")
    assert caption.startswith(
        "After 10 steps, as far as all of them got, a leads with training loss 2.00, then b with 2.50"
    )
    assert caption.endswith("b ends lowest, at 1.00.")
    higher = words.curves(bands, "steps", "accuracy", higher=True)
    assert "b leads with accuracy 2.50, then a with 2.00; a ends highest, at 2.00." in higher


def test_agreement_names_the_worst() -> None:
    text = words.agreement({"good": np.array([0.9, 1.0, 1.1]), "bad": np.array([4.0, 5.0, 6.0])})
    assert text.startswith("For good the measured KL is 1.0 times the predicted")
    assert "furthest off is bad, 5.0 times" in text


@pytest.mark.parametrize(("names", "expected"), [
    ([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c"),
    (list("abcdefgh"), "a, b, c, d, e and 3 more"),
])  # fmt: skip
def test_listed(names: list[str], expected: str) -> None:
    assert words.listed(names) == expected


def test_close_numbers_get_enough_digits() -> None:
    assert words.apart(0.10071, 0.10094) == ("0.1007", "0.1009")
    assert words.apart(1.0, 1.0) == ("1.00", "1.00")
    assert words.apart(math.nan, 1.0) == ("–", "1.00")
