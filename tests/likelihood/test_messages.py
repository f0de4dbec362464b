"""Outputs and targets that cannot be meant are refused, and the message says what was given and what to do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from natgrad.errors import ArgumentError, NatgradError, ShapeError
from natgrad.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, MultiCategorical, Poisson, Weighted

F34 = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("likelihood", "f", "error", "message"),
    [
        (Gaussian(), torch.zeros(5), ShapeError, r"Gaussian\(scale=1.0\) .*got \[5\].*unsqueeze\(-1\)"),
        (Bernoulli(), torch.zeros(()), ShapeError, r"Bernoulli\(\) .*got \[\]"),
        (Poisson(), torch.zeros(3, 4, dtype=torch.int64), ArgumentError, "torch.int64.*not predicted labels"),
        (Categorical(), torch.zeros(3, 4, dtype=torch.complex64), ArgumentError, "torch.complex64"),
        (Categorical(), {"logits": F34}, ArgumentError, "got dict.*output.logits"),
        (Categorical(), torch.zeros(3, 1), ShapeError, r"at least two classes.*\[3, 1\].*natgrad.Bernoulli"),
        (MultiCategorical([2, 3]), F34, ShapeError, r"needs 5 logits.*got shape \[3, 4\]"),
        (Gaussian.learned(), torch.zeros(3, 5), ShapeError, r"even number of columns.*\[3, 5\].*Gaussian\(scale"),
        (Gaussian((1.0, 2.0)), F34, ShapeError, r"2 scales.*\[3, 4\]"),
        (Weighted(Categorical()), torch.zeros(4), ShapeError, r"got \[4\]"),
    ],
)
def test_outputs(likelihood: Likelihood, f: Tensor, error: type[NatgradError], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        likelihood.check_output(f)


TWO = MultiCategorical([1, 3])
IMAGE = torch.zeros(2, 4, 5, 5)  # classes on axis 1, as torch's loss takes them


@pytest.mark.parametrize(
    ("likelihood", "f", "y", "error", "message"),
    [
        (Categorical(), F34, torch.tensor([0, 4, 1]), ArgumentError, "between 0 and 4.*4 classes.*0 to 3"),
        (Categorical(), F34, torch.tensor([0, -100, 1]), ArgumentError, "between -100 and 1.*ignore_index=-100"),
        (Categorical(), F34, torch.zeros(3), ShapeError, r"needs the output's shape \[3, 4\].*target.long\(\)"),
        (Categorical(), F34, torch.zeros(3, 1).long(), ShapeError, r"\[3\], but got \[3, 1\].*squeeze\(-1\)"),
        (Categorical(), F34, torch.zeros(3, 4).long(), ShapeError, r"argmax\(-1\)"),
        (Categorical(), F34, torch.zeros(2).long(), ShapeError, "same number of examples"),
        (Categorical(), IMAGE, torch.zeros(2, 5, 5).long(), ShapeError, r"movedim\(1, -1\)"),
        (Categorical(), IMAGE, torch.zeros(2, 5, 5, 4), ShapeError, r"movedim\(1, -1\)"),
        (Categorical(), F34, torch.ones(3, 4), ArgumentError, r"smallest value is 1 .*off one by up to 3\."),
        (Categorical(), F34, torch.full((3, 4), math.nan), ArgumentError, "smallest value is nan"),
        (Categorical(), F34, torch.tensor([[1.5, -0.5, 0, 0]] * 3), ArgumentError, "smallest value is -0.5"),
        (Categorical(), F34, torch.zeros(3, dtype=torch.bool), ArgumentError, "torch.bool.*natgrad.Bernoulli"),
        (Categorical(), F34, (torch.zeros(3).long(), torch.ones(3)), ArgumentError, r"Weighted\(Categorical\(\)\)"),
        (Categorical(), F34, [0, 1, 2], ArgumentError, "type list.*as_tensor"),
        (TWO, F34, torch.zeros(3).long(), ShapeError, r"integer targets of shape \[3, 2\], one per decision.*\[3\]"),
        (TWO, F34, torch.zeros(3, 4).long(), ShapeError, r"\[3, 2\].*\[3, 4\]"),
        (TWO, F34, torch.zeros(3, 2), ShapeError, r"integer targets.*torch.float32"),
        (TWO, F34, torch.tensor([[0, 3]] * 3), ArgumentError, "Decision 1 .*between 3 and 3.*between 0 and 2"),
        (TWO, F34, torch.tensor([[-1, 0]] * 3), ArgumentError, "Decision 0 .*between -1 and -1.*between 0 and 0"),
        (Bernoulli(), F34, torch.full((3, 4), -1.0), ArgumentError, r"between -1 and -1.*\(target \+ 1\) / 2"),
        (Bernoulli(), F34, torch.full((3, 4), 2), ArgumentError, "between 2 and 2.*natgrad.Categorical"),
        (Bernoulli(), F34, torch.full((3, 4), math.nan), ArgumentError, "between nan and nan"),
        (Bernoulli(), F34[:, :1], torch.zeros(3), ShapeError, r"\[3, 1\], but got \[3\].*No broadcasting"),
        (Gaussian(), F34[:, :1], torch.zeros(3), ShapeError, r"shape \[3, 1\], but got \[3\].*\.reshape\(\[3, 1\]\)"),
        (Gaussian(), F34, (F34, torch.ones(3)), ArgumentError, r"target \(labels, weights\).*natgrad.Weighted"),
        (Gaussian.learned(), F34, F34, ShapeError, r"target of shape \[3, 2\], but got \[3, 4\]"),
        (Poisson(), F34, torch.full((3, 4), 0.5), ArgumentError, r"fractions.*0\.5.*log\(exposure\)"),
        (Poisson(), F34, torch.full((3, 4), -1), ArgumentError, "smallest value of -1"),
        (Poisson(), F34, torch.full((3, 4), math.nan), ArgumentError, "counts"),
        (Poisson(), F34, torch.zeros(4, 3), ShapeError, r"\[3, 4\], but got \[4, 3\]"),
    ],
)
def test_targets(likelihood: Likelihood, f: Tensor, y: Tensor, error: type[NatgradError], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        likelihood.check_target(f, y)
    if error is ShapeError:  # wrong shapes are refused by the computation too, never broadcast
        for method in (likelihood.nll, likelihood.score):
            with pytest.raises(ShapeError):
                method(f, y)


@pytest.mark.parametrize(
    ("likelihood", "y"),
    [
        (Categorical(), torch.tensor([0, 3, 1])),
        (Categorical(), torch.full((3, 4), 0.25)),
        (TWO, torch.tensor([[0, 2], [0, 0], [0, 1]])),
        (Bernoulli(), torch.zeros(3, 4, dtype=torch.bool)),
        (Bernoulli(), torch.full((3, 4), 0.5)),
        (Bernoulli(), torch.ones(3, 4, dtype=torch.int64)),
        (Gaussian(), torch.zeros(3, 4, dtype=torch.int64)),
        (Gaussian.learned(), torch.zeros(3, 2)),
        (Poisson(), torch.full((3, 4), 7.0)),
        (Poisson(), torch.full((3, 4), 7)),
    ],
)
def test_possible_targets_pass(likelihood: Likelihood, y: Tensor) -> None:
    likelihood.check_output(F34)
    likelihood.check_target(F34, y)
    assert likelihood.nll(F34, y).shape == (3,)
    assert likelihood.score(F34, y).shape == (3, 4)


def test_the_loss_names_labels_that_are_out_of_range() -> None:
    """nll checks no values beforehand; torch's index error is turned into the one that says what to do."""
    f = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"between 0 and 2.*labels from 0 to 1"):
        Categorical().nll(f, torch.tensor([0, 1, 2]))
