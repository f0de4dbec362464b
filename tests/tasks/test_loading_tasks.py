"""Tasks by name, and the user's own with every way they can be wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from natgrad.errors import ArgumentError, ShapeError
from natgrad.likelihood import Categorical, Gaussian, Weighted
from natgrad.tasks import Metric, Task, load_task
from natgrad.tasks.task import validate

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4


def make(**changes) -> Task:
    settings = {"name": "t", "description": "d", "model": lambda seed: nn.Linear(3, 4), "likelihood": Categorical()}
    settings |= {"train": (X, Y), "test": (X, Y)}
    return Task(**{**settings, **changes})


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current folder and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    count = 0

    def write(source: str) -> str:
        nonlocal count
        count += 1
        name = f"user_tasks_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text(IMPORTS + source)
        return name

    return write


IMPORTS = """
import torch
from torch import nn
from natgrad.likelihood import Categorical
from natgrad.tasks import Task
"""
FACTORY = """
def build(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 4)
"""
FOUR = "nn.Linear(3, 4), Categorical(), (torch.ones(8, 3), torch.arange(8) % 4), (torch.ones(4, 3), torch.arange(4))"


def test_four_values_with_a_module(module):
    name = module(f"def task():\n    '''Words about it.'''\n    return {FOUR}\n")
    task = load_task(f"{name}:task")
    validate(task)
    assert task.description == "Words about it." and task.train_rows == 8
    first, second = task.model(0), task.model(1)
    assert first is not second
    with torch.no_grad():
        first.weight.zero_()
    assert not torch.equal(first.weight, second.weight), "runs must not share parameters"


def test_four_values_with_a_factory(module):
    name = module(f"{FACTORY}\ndef task():\n    return build, {FOUR.removeprefix('nn.Linear(3, 4), ')}\n")
    task = load_task(f"{name}:task")
    assert not torch.equal(task.model(0).weight, task.model(1).weight)
    assert torch.equal(task.model(1).weight, task.model(1).weight)


def test_a_task(module):
    name = module(
        f"def task():\n    m, l, a, b = {FOUR}\n    return Task('mine', 'd', lambda seed: m, l, a, b, batch_size=3)\n"
    )
    assert load_task(f"{name}:task").batch_size == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "returned int"),
        ("return 1, 2", "a tuple of 2"),
        ("return nn.Linear(3, 4), 'categorical', (torch.ones(2, 3), torch.ones(2)), None", "likelihood"),
        ("return 'model', Categorical(), (torch.ones(2, 3), torch.ones(2)), None", "first value"),
        ("return nn.Linear(3, 4), Categorical(), torch.ones(2, 3), torch.ones(2)", "pair \\(inputs, targets\\)"),
        ("return nn.Linear(3, 4), Categorical(), (torch.ones(2, 3), [1, 2]), None", "train targets must be a tensor"),
    ],
)
def test_wrong_returns(module, body, message):
    name = module(f"def task():\n    {body}\n")
    with pytest.raises(ArgumentError, match=message):
        load_task(f"{name}:task")


def test_wrong_references(module):
    name = module("def make_task():\n    pass\ndef needs(x):\n    pass\nvalue = 3\n")
    broken = module("raise RuntimeError('boom')\n")
    lacking = module("import surely_not_installed_module\n")
    for reference, message in [
        (f"{name}:make_tusk", "does not exist.*did you mean 'make_task'"),
        (f"{name}:value", "is not a function"),
        (f"{name}:needs", "callable without arguments"),
        ("no_such_module_here:task", "no module 'no_such_module_here'"),
        (":task", "not module:function"),
        (f"{name}:", "not module:function"),
        (f"{broken}:task", "RuntimeError: boom"),
        (f"{lacking}:task", "needs the module 'surely_not_installed_module'"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            load_task(reference)


def test_unknown_name_and_needless_data(tmp_path):
    with pytest.raises(ArgumentError, match="did you mean 'digits'"):
        load_task("digit")
    with pytest.raises(ArgumentError, match="leave --data out"):
        load_task("digits", tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": (X, Y[:-1])}, ShapeError, "12 input rows but 11 target rows"),
        ({"train": (X[:0], Y[:0])}, ArgumentError, "no rows"),
        ({"train": ((X, X[:3]), Y)}, ShapeError, r"different numbers of rows: \[3, 12\]"),
        ({"test": X}, ArgumentError, "test must be a pair"),
        ({"test": (X, torch.tensor(1.0))}, ArgumentError, "rows on the first axis"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
    ],
)
def test_parts_that_cannot_be_a_task(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda seed: "model"}, "must return a torch.nn.Module"),
        ({"model": lambda seed: nn.Flatten()}, "no trainable parameter"),
        ({"model": lambda seed: nn.Linear(5, 4)}, "do not fit together.*tensor \\(12, 3\\) float32"),
        ({"train": (X, Y + 3)}, "do not fit together"),
        ({"train": (torch.full_like(X, torch.nan), Y)}, "train inputs have a NaN or infinite entry, first in row 0"),
        ({"metric": Metric("m", lambda output, target: output.no_such)}, "do not fit together"),
    ],
)
def test_validation_by_running(changes, message):
    with pytest.raises(ArgumentError, match=message):
        validate(make(**changes))


def changed(tensor: torch.Tensor, row: int, value: float) -> torch.Tensor:
    result = tensor.clone()
    result[row] = value
    return result


MANY = 5000  # more than one chunk
LONG_X, LONG_Y = X.repeat(MANY // 12 + 1, 1)[:MANY], Y.repeat(MANY // 12 + 1)[:MANY]
WEIGHTS = torch.ones(MANY)
REAL = LONG_Y.float().unsqueeze(1).expand(-1, 4)


@pytest.mark.parametrize("row", [150, MANY - 1])
@pytest.mark.parametrize("label", ["train", "test"])
@pytest.mark.parametrize(
    ("likelihood", "inputs", "targets", "message"),
    [
        (Categorical(), LONG_X, lambda row: changed(LONG_Y, row, 4), "Labels lie between 0 and 4"),
        (Categorical(), LONG_X, lambda row: changed(LONG_Y, row, -1), "Labels lie between -1 and 3"),
        (Gaussian(), LONG_X, lambda row: changed(REAL, row, torch.nan), "targets have a NaN.* first in row {row}"),
        (Weighted(Categorical()), LONG_X, lambda row: (LONG_Y, changed(WEIGHTS, row, -1.0)), "[Ww]eight"),
        (Weighted(Categorical()), LONG_X, lambda row: (changed(LONG_Y, row, 4), WEIGHTS), "Labels lie between 0 and 4"),
        (Categorical(), lambda row: changed(LONG_X, row, torch.inf), lambda row: LONG_Y, "inputs .* in row {row}"),
    ],
)
def test_every_row_is_looked_at(likelihood, inputs, targets, message, label, row):
    bad = (inputs(row) if callable(inputs) else inputs, targets(row))
    usual = REAL if isinstance(likelihood, Gaussian) else LONG_Y
    good = (LONG_X, (LONG_Y, WEIGHTS) if isinstance(likelihood, Weighted) else usual)
    validate(make(likelihood=likelihood, train=good, test=good))
    with pytest.raises(ArgumentError, match=f"(?s)Task 't': {label} .*{message.format(row=row)}"):
        validate(make(likelihood=likelihood, **{"train": good, "test": good, label: bad}))


def test_a_missing_target_of_weight_zero_is_allowed():
    likelihood, missing = Weighted(Gaussian()), changed(REAL, 150, torch.nan)
    good = (LONG_X, (missing, changed(WEIGHTS, 150, 0.0)))
    validate(make(likelihood=likelihood, train=good, test=good))
    with pytest.raises(ArgumentError, match="train targets have a NaN or infinite entry, first in row 150"):
        validate(make(likelihood=likelihood, train=(LONG_X, (missing, WEIGHTS)), test=good))


def test_an_overflowing_model_is_named():
    with pytest.raises(ArgumentError, match="untrained model is"):
        validate(make(likelihood=Gaussian(), train=(X * 1e30, REAL[:12]), test=(X, REAL[:12])))


def test_a_tuple_of_inputs_becomes_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, a, b):
            return self.linear(a + b)

    validate(make(model=lambda seed: Two(), train=((X, X), Y), test=((X, X), Y)))
