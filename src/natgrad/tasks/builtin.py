"""The built-in tasks. Each function reads its data, splits it with a fixed seed and returns a Task."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import MissingExtraError
from natgrad.likelihood import Bernoulli, Categorical, Gaussian, Poisson
from natgrad.tasks import curves as curves_data
from natgrad.tasks import idx, metrics, models, stdlib
from natgrad.tasks.task import Data, Task

LM_CONTEXT = 64


def digits() -> Task:
    """Handwritten digits, 8x8 pixels, ten classes; small convolutional network."""
    inputs, labels = _sklearn("load_digits")
    images = (torch.as_tensor(inputs, dtype=torch.float32) / 16).reshape(-1, 1, 8, 8)
    train, test = _split((images, torch.as_tensor(labels, dtype=torch.int64)))
    return Task(
        "digits",
        "Handwritten digits, 1797 images of 8x8 pixels in ten classes (UCI, ships with scikit-learn); a small "
        "convolutional network.",
        models.seeded(lambda: models.small_convnet((8, 16), 8, 10)),
        Categorical(),
        train,
        test,
        batch_size=128,
        metric=metrics.ACCURACY,
    )


def digits_autoencoder() -> Task:
    """Autoencoder 64-100-50-25-8 of the digit images, Bernoulli pixels."""
    inputs, _ = _sklearn("load_digits")
    pixels = torch.as_tensor(inputs, dtype=torch.float32) / 16
    train, test = _split((pixels, pixels))
    return Task(
        "digits-autoencoder",
        "Handwritten digits compressed to 8 numbers: a tanh autoencoder 64-100-50-25-8, mirrored, on pixels in [0, 1] "
        "as independent Bernoulli means (ships with scikit-learn).",
        models.seeded(lambda: models.autoencoder([64, 100, 50, 25, 8])),
        Bernoulli(),
        train,
        test,
        batch_size=256,
        metric=metrics.RECONSTRUCTION,
    )


def breast_cancer() -> Task:
    """Logistic regression on 30 measurements of tumours."""
    inputs, labels = _sklearn("load_breast_cancer")
    y = torch.as_tensor(labels, dtype=torch.float32).unsqueeze(1)
    train, test = _split((_standardise(inputs), y))
    return Task(
        "breast-cancer",
        "Malignant or benign from 30 measurements of 569 tumours (Wisconsin diagnostic data, ships with scikit-learn); "
        "logistic regression, every step on all training rows.",
        models.seeded(lambda: nn.Linear(30, 1)),
        Bernoulli(),
        train,
        test,
        batch_size=len(train[0]),
        metric=metrics.BINARY_ACCURACY,
    )


def diabetes() -> Task:
    """Gaussian regression with learned scale on ten measurements of patients."""
    inputs, progress = _sklearn("load_diabetes")
    train, test = _split((_standardise(inputs), _standardise(progress).unsqueeze(1)))
    return Task(
        "diabetes",
        "Disease progression of 442 patients from 10 measurements (ships with scikit-learn); an MLP 10-32-2 that gives "
        "mean and log scale of a Gaussian.",
        models.seeded(lambda: models.mlp([10, 32, 2], nn.Tanh)),
        Gaussian.learned(),
        train,
        test,
        batch_size=128,
        metric=metrics.MEAN_SQUARED_ERROR,
    )


def counts() -> Task:
    """Poisson regression: functions per module of Python's own standard library."""
    features, target = stdlib.definition_counts()
    start = math.log(float(target.mean()))
    train, test = _split((features, target))
    return Task(
        "counts",
        "How many functions each module of Python's own standard library defines, from ten marks of its size and style "
        f"({len(target)} files of this Python); Poisson regression with a log link, every step on all "
        "training rows. Real counts vary more than a Poisson variable would. The bias starts at the log of the mean "
        "count.",
        models.seeded(lambda: models.linear(len(stdlib.FEATURES), bias=start)),
        Poisson(),
        train,
        test,
        batch_size=len(train[0]),
        metric=metrics.POISSON_DEVIANCE,
    )


def stdlib_lm() -> Task:
    """Character language model of the standard library's source; small transformer."""
    train, test = stdlib.character_windows(1_000_000, LM_CONTEXT)
    return Task(
        "stdlib-lm",
        "Next-character model of the source text of Python's own standard library: a transformer of 2 layers and width "
        f"64 on windows of {LM_CONTEXT} characters. Loss per character; test files are not training files.",
        models.seeded(lambda: models.Transformer(len(stdlib.ALPHABET), LM_CONTEXT, width=64, layers=2, heads=4)),
        Categorical(),
        (train[:, :-1].contiguous(), train[:, 1:].contiguous()),
        (test[:, :-1].contiguous(), test[:, 1:].contiguous()),
        batch_size=32,
        metric=metrics.ACCURACY,
    )


def curves_autoencoder() -> Task:
    """CURVES, the synthetic deep autoencoder of the K-FAC paper."""
    images = curves_data.curves(12_000, seed=0)
    return Task(
        "curves-autoencoder",
        "CURVES, the synthetic task of the K-FAC paper: 28x28 images of curves through three random points (10000 for "
        "training, from a seed); autoencoder 784-400-200-100-50-25-6, mirrored, with a linear code layer and Xavier "
        "weights. Units are tanh: the paper's logistic units need its sparse initial weights to train well.",
        models.seeded(lambda: models.autoencoder([784, 400, 200, 100, 50, 25, 6])),
        Bernoulli(),
        (images[:10_000], images[:10_000]),
        (images[10_000:], images[10_000:]),
        batch_size=500,
        metric=metrics.RECONSTRUCTION,
    )


def mnist(data: Path | None) -> Task:
    """MNIST from IDX files in --data DIR; convolutional network."""
    return _mnist_family("mnist", "MNIST: handwritten digits", data)


def fashion_mnist(data: Path | None) -> Task:
    """Fashion-MNIST from IDX files in --data DIR; convolutional network."""
    return _mnist_family("fashion-mnist", "Fashion-MNIST: pictures of clothing", data)


def fashion_mnist_autoencoder(data: Path | None) -> Task:
    """Autoencoder 784-1000-500-250-30 of Fashion-MNIST from IDX files in --data DIR, Bernoulli pixels."""
    tensors = idx.read_mnist_family("fashion-mnist", data)
    train, test = (tensors[f"{key}_images"].float().flatten(1) / 255 for key in ("train", "test"))
    return Task(
        "fashion-mnist-autoencoder",
        f"Fashion-MNIST, {len(train)} pictures of clothing compressed to 30 numbers, from IDX files: the tanh "
        "autoencoder 784-1000-500-250-30, mirrored, with a linear code, on pixels in [0, 1] as independent Bernoulli "
        "means.",
        models.seeded(lambda: models.autoencoder([784, 1000, 500, 250, 30])),
        Bernoulli(),
        (train, train),
        (test, test),
        batch_size=1000,
        metric=metrics.RECONSTRUCTION,
    )


def _mnist_family(name: str, title: str, data: Path | None) -> Task:
    tensors = idx.read_mnist_family(name, data)
    sets = {}
    for key in ("train", "test"):
        images = tensors[f"{key}_images"].float().unsqueeze(1) / 255
        sets[key] = (images, tensors[f"{key}_labels"].long())
    size = int(sets["train"][0].shape[-1])
    return Task(
        name,
        f"{title}, {len(sets['train'][0])} training images in ten classes, from IDX files; a convolutional network.",
        models.seeded(lambda: models.small_convnet((16, 32), size, 10)),
        Categorical(),
        sets["train"],
        sets["test"],
        batch_size=256,
        metric=metrics.ACCURACY,
    )


BUILTIN: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "digits-autoencoder": digits_autoencoder,
    "breast-cancer": breast_cancer,
    "diabetes": diabetes,
    "counts": counts,
    "stdlib-lm": stdlib_lm,
    "curves-autoencoder": curves_autoencoder,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-autoencoder": fashion_mnist_autoencoder,
}
"""Name -> function that builds the task; its docstring is a summary. NEEDS_DATA are those that take a folder."""
NEEDS_DATA = frozenset({"mnist", "fashion-mnist", "fashion-mnist-autoencoder"})


def _sklearn(loader: str) -> tuple[Any, Any]:
    """(data, target) arrays of a data set that ships with scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            "This task's data ships with scikit-learn, which is not installed. Install the extra: "
            "pip install 'natgrad[tasks]'."
        ) from error
    bunch = getattr(datasets, loader)()
    return bunch.data, bunch.target


def _standardise(values: Any) -> Tensor:
    """float32 with mean 0 and standard deviation 1 over the first axis."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    return ((tensor - tensor.mean(0)) / tensor.std(0)).float()


def _split(data: tuple[Tensor, Tensor]) -> tuple[Data, Data]:
    """Four fifths for training and one fifth for testing, dealt out with a fixed seed."""
    rows = len(data[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    cut = rows - math.floor(rows / 5)
    return (data[0][order[:cut]], data[1][order[:cut]]), (data[0][order[cut:]], data[1][order[cut:]])
