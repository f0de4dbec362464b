"""skorch: natgrad's optimizers as parameters of a scikit-learn estimator, its closures, its checkpoints."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad as ng
from natgrad.errors import NotObservedError

skorch = pytest.importorskip("skorch")
from test_examples import load  # noqa: E402

example = load("skorch_classifier")
X, Y = example.X[:300], example.Y[:300]


def fitted(net: Any, **fit: Any) -> Any:
    torch.manual_seed(0)
    return net.fit(X, Y, **fit)


def parameters(net: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.module_.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, p in a.items():
        assert torch.equal(p, b[name]), name


def test_kfac_ends_below_sgd_at_its_best_rate():
    losses = example.main()
    sgd = [loss for name, loss in losses.items() if name.startswith("SGD")]
    assert len(sgd) == len(example.RATES) and min(sgd) not in (sgd[0], sgd[-1])  # the best rate is inside the grid
    assert losses["K-FAC"] < 0.1 < 1 < min(sgd)


def test_without_attach_the_error_says_what_to_do():
    net = skorch.NeuralNetClassifier(
        example.mlp, optimizer=ng.KFAC, optimizer__likelihood=ng.Categorical(), lr=1.0,
        criterion=torch.nn.CrossEntropyLoss, train_split=None, verbose=0,
    )  # fmt: skip
    with pytest.raises(NotObservedError, match="attach"):
        fitted(net)


def test_closures_run_once_and_their_callbacks_with_them():
    computed: list[float] = []

    class Watch(skorch.callbacks.Callback):
        def on_grad_computed(self, net: Any, named_parameters: Any, **kwargs: Any) -> None:
            computed.append(sum(float(p.grad.square().sum()) for _, p in named_parameters))

    net = fitted(example.classifier(callbacks=[Watch()]))
    assert len(computed) == 3 * 2 and min(computed) > 0
    assert net.optimizer_.state_dict()["state"][0]["step"] == 6
    assert net.history[-1, "train_loss"] < net.history[0, "train_loss"]


def test_what_set_params_changes_holds_from_the_next_step():
    schedule = skorch.callbacks.LRScheduler(policy="StepLR", step_size=1, gamma=0.5)
    net = fitted(example.classifier(optimizer__damping=0.5, optimizer__search=ng.KLClip(1.0), callbacks=[schedule]))
    assert net.optimizer_.metrics()["natgrad/damping"] == 0.5
    assert net.history[:, "event_lr"] == [1.0, 0.5, 0.25]
    net.set_params(optimizer__damping=0.25, callbacks=None).partial_fit(X, Y)
    assert net.optimizer_.metrics()["natgrad/damping"] == 0.25


def test_groups_by_pattern_are_steps_of_their_own():
    """skorch's wildcards make parameter groups; a group with a rate of 0 stays where it is."""
    groups = [("4.*", {"lr": 0.0})]
    net = example.classifier(optimizer__param_groups=groups, optimizer__search=ng.KLClip(0.01))
    torch.manual_seed(0)
    net.initialize()
    before = parameters(net)
    net.partial_fit(X, Y)
    for name, p in parameters(net).items():
        assert torch.equal(p, before[name]) == name.startswith("4."), name


def test_a_run_resumed_from_saved_parameters_is_the_uninterrupted_run(tmp_path):
    files = {f"f_{part}": tmp_path / part for part in ("params", "optimizer")}
    straight = fitted(example.classifier(max_epochs=4))

    fitted(example.classifier(max_epochs=2)).save_params(**files)
    torch.manual_seed(1)  # other initial weights
    net = example.classifier(max_epochs=2).initialize()
    net.load_params(**files)
    net.partial_fit(X, Y)
    assert_same(parameters(net), parameters(straight))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_fitted_estimator_train_on_as_it_would(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, example.__name__, example)  # where pickle looks for the classes
    net = fitted(example.classifier(max_epochs=2))
    net.set_params(torch_load_kwargs={"weights_only": False})  # the pickle of whole objects, by skorch's own rule
    other = copied(net)
    other.partial_fit(X, Y)
    unmoved = parameters(net)
    net.partial_fit(X, Y)
    assert_same(parameters(other), parameters(net))
    assert not torch.equal(unmoved["0.weight"], parameters(net)["0.weight"])


def test_accumulated_batches_make_the_step_of_the_whole_batch():
    """The recipe of skorch's documentation: a step after every second batch, the loss divided by two."""

    class Accumulating(example.NaturalClassifier):
        def get_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().get_loss(*args, **kwargs) / 2

        def train_step(self, batch: Any, **fit: Any) -> dict[str, Any]:
            step = self.train_step_single(batch, **fit)
            if len(self.history[-1, "batches"]) % 2 == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    def trained(kind: Any, batch_size: int) -> dict[str, Tensor]:
        options = {
            "optimizer": ng.KFAC, "optimizer__likelihood": ng.Categorical(), "optimizer__estimate": ng.Exact(),
            "lr": 1.0, "criterion": torch.nn.CrossEntropyLoss, "train_split": None, "verbose": 0, "max_epochs": 2,
        }  # fmt: skip
        torch.manual_seed(0)
        net = kind(lambda: example.mlp().double(), batch_size=batch_size, **options)
        return parameters(net.fit(X.double(), Y))

    whole, parts = trained(example.NaturalClassifier, 150), trained(Accumulating, 75)
    for name, p in whole.items():
        torch.testing.assert_close(parts[name], p, rtol=1e-9, atol=1e-11)
