"""K-FAC in skorch: a scikit-learn classifier of the digits, beside skorch's own SGD at its best rate.

skorch gives an optimizer nothing but parameters, so `attach` tells it which module they belong to. It also gives every
optimizer its own default `lr=0.01`, so the rate has to be set.

    python examples/skorch_classifier.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

import natgrad as ng

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of SGD; K-FAC runs with its defaults
IMAGES, LABELS = load_digits(return_X_y=True)
X, Y = torch.tensor(IMAGES, dtype=torch.float32) / 16, torch.tensor(LABELS)


class NaturalClassifier(NeuralNetClassifier):
    """A `NeuralNetClassifier` for natgrad's optimizers."""

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> NaturalClassifier:
        super().initialize_optimizer(*args, **kwargs)
        self.optimizer_.attach(self.module_)
        return self


def mlp(width: int = 32) -> nn.Module:
    """Returns logits: with `CrossEntropyLoss` skorch applies the softmax itself, in `predict_proba`."""
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def classifier(sgd: float | None = None, **options: Any) -> NeuralNetClassifier:
    """An untrained classifier."""
    quiet = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0, "batch_size": 150, "max_epochs": 3}
    if sgd is not None:
        return NeuralNetClassifier(mlp, lr=sgd, **{**quiet, **options})
    natural = {"optimizer": ng.KFAC, "optimizer__likelihood": ng.Categorical(), "lr": 1.0}
    return NaturalClassifier(mlp, **{**quiet, **natural, **options})


def training_loss(net: NeuralNetClassifier) -> float:
    """Of the 1500 training images, in nats."""
    return nn.functional.cross_entropy(net.forward(X[:1500]), Y[:1500]).item()


def main() -> dict[str, float]:
    """Train each for 30 steps from the same weights, and return the training losses."""
    runs = {f"SGD({rate})": classifier(rate) for rate in RATES} | {"K-FAC": classifier()}
    losses = {}
    for name, net in runs.items():
        torch.manual_seed(0)
        net.fit(X[:1500], Y[:1500])
        losses[name], accuracy = training_loss(net), net.score(X[1500:], Y[1500:])
        print(f"{name}: {losses[name]:.4f} nats per image after 30 steps, test accuracy {accuracy:.3f}")
    # The optimizer's arguments are parameters of the estimator like any other.
    torch.manual_seed(0)
    search = GridSearchCV(classifier(max_epochs=1), {"optimizer__search": [ng.KLClip(0.01), ng.KLClip(0.1)]}, cv=2)
    print(f"best of two radii: {search.fit(X[:1500], Y[:1500]).best_params_['optimizer__search']}")
    return losses


if __name__ == "__main__":
    main()
