"""The built-in tasks: shapes, determinism, and that their models can learn them."""

from __future__ import annotations

import ast
import math
import sysconfig
from pathlib import Path

import pytest
import torch

from natgrad.tasks import BUILTIN, load_task
from natgrad.tasks.builtin import NEEDS_DATA
from natgrad.tasks.stdlib import ALPHABET, character_windows, count_definitions, definition_counts, encode, sources
from natgrad.tasks.task import forward, mean_nll, take, validate

NAMES = sorted(set(BUILTIN) - NEEDS_DATA)


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(name) for name in NAMES}


@pytest.mark.parametrize(
    ("name", "inputs", "targets", "classes"),
    [
        ("digits", (1, 8, 8), (), 10),
        ("digits-autoencoder", (64,), (64,), 64),
        ("breast-cancer", (30,), (1,), 1),
        ("diabetes", (10,), (1,), 2),
        ("counts", (10,), (1,), 1),
        ("stdlib-lm", (64,), (64,), len(ALPHABET)),
        ("curves-autoencoder", (784,), (784,), 784),
    ],
)
def test_shapes(tasks, name, inputs, targets, classes):
    task = tasks[name]
    assert task.name == name
    for x, y in (task.train, task.test):
        assert x.shape[1:] == inputs and y.shape[1:] == targets
    assert task.model(0)(task.train[0][:2]).shape[-1] == classes
    assert 3 * task.test_rows < task.train_rows < 20 * task.test_rows
    validate(task)


@pytest.mark.parametrize("name", NAMES)
def test_first_loss_is_that_of_an_ignorant_model(tasks, name):
    task = tasks[name]
    x, y = task.train
    with torch.no_grad():
        loss = float(mean_nll(task.likelihood, forward(task.model(0), x[:200]), y[:200]))
    ignorant = {"digits": math.log(10), "stdlib-lm": math.log(len(ALPHABET)), "breast-cancer": math.log(2)}
    ignorant |= {"digits-autoencoder": 64 * math.log(2), "curves-autoencoder": 784 * math.log(2)}
    if name in ignorant:
        assert loss == pytest.approx(ignorant[name], rel=0.25)
    assert math.isfinite(loss)


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(tasks, name):
    task = tasks[name]
    torch.manual_seed(5)
    first = [p.detach().clone() for p in task.model(7).parameters()]
    state = torch.get_rng_state()
    again = list(task.model(7).parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    other = list(task.model(8).parameters())
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "curves-autoencoder"])
def test_no_training_row_is_a_test_row_by_position(tasks, name):
    task = tasks[name]
    train = {row.numpy().tobytes() for row in task.train[0]}
    shared = sum(row.numpy().tobytes() in train for row in task.test[0])
    # A few windows of source text (licence headers, rules) occur in several files; data rows never do.
    assert shared <= (0.01 * task.test_rows if name == "stdlib-lm" else 0)


def test_counts_agree_with_the_syntax_tree():
    texts = sources(top_level_only=False)[:40]
    wrong = 0
    for text in texts:
        nodes = ast.walk(ast.parse(text))
        functions = sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in nodes)
        wrong += functions != count_definitions(text)  # a docstring may show a function that is none
    assert wrong <= 6
    assert count_definitions("def f():\n  async def g(): pass\n  undef = 1 # def\n") == 2


def test_count_features_are_standardised():
    features, counts = definition_counts()
    assert features.shape[1] == 10 and 0.9 * len(sources(top_level_only=False)) < len(features)
    assert torch.allclose(features.mean(0), torch.zeros(10), atol=1e-4)
    assert torch.allclose(features.std(0), torch.ones(10), atol=1e-4)
    assert (counts >= 0).all() and torch.equal(counts, counts.round())


def test_characters_survive_encoding():
    text = 'def f(x):\n    return "~é" # \t end'
    decoded = "".join(ALPHABET[code] for code in encode(text).tolist())
    assert decoded == text.replace("\t", " ").replace("é", "?")


def test_language_targets_are_the_next_characters(tasks):
    x, y = tasks["stdlib-lm"].train
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x[1:, 0], y[:-1, -1]), "windows follow one another"
    assert x.min() >= 0 and x.max() < len(ALPHABET)
    path = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    parts = [
        "".join(ALPHABET[code] for code in windows[:, :-1].flatten().tolist())
        for windows in character_windows(10**7, 64)
    ]
    passage = path.read_text(encoding="utf-8")[5000:5200]
    assert sum(passage in part for part in parts) == 1


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "diabetes", "counts", "digits-autoencoder"])
def test_adam_learns_it(tasks, name):
    task = tasks[name]
    model = task.model(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = slice(0, 128)
    x, y = take(task.train[0], batch), take(task.train[1], batch)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = mean_nll(task.likelihood, forward(model, x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
