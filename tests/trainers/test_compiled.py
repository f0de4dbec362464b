"""``torch.compile`` as the trainers ask for it: the steps are those of the model that is not compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
BACKEND = "aot_eager"
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
Y = X[:, :3].argmax(1)
BATCH = 16  # the last batch has 8
FOLDER: list[str] = []  # where the Trainer writes


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def kfac(model: nn.Module) -> Any:
    return ng.KFAC(model, ng.Categorical(), lr=0.3, search=ng.KLClip(0.1))


def with_accelerate(compiled: bool) -> tuple[nn.Module, Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    plugin = accelerate.utils.TorchDynamoPlugin(backend=BACKEND) if compiled else None
    accelerator = accelerate.Accelerator(cpu=True, dynamo_plugin=plugin)
    model = net()
    called, optimizer = accelerator.prepare(model, kfac(model))
    for x, y in zip(X.split(BATCH), Y.split(BATCH), strict=True):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(called(x), y))
        optimizer.step()
    accelerate.state.AcceleratorState._reset_state(True)
    return model, optimizer.optimizer


def with_lightning(compiled: bool) -> tuple[nn.Module, Any]:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made = []

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def configure_optimizers(self) -> Any:
            made.append(kfac(self.network))
            return made[-1]

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", precision="64-true", **quiet)
    module: Any = Classifier()
    trainer.fit(
        torch.compile(module, backend=BACKEND) if compiled else module,
        DataLoader(TensorDataset(X, Y), batch_size=BATCH),
    )
    return module.network, made[-1]


def with_skorch(compiled: bool) -> tuple[nn.Module, Any]:
    skorch = pytest.importorskip("skorch")

    class Classifier(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_.attach(self.module_)
            return self

    options: dict[str, Any] = {"compile": True, "compile__backend": BACKEND} if compiled else {}
    estimator = Classifier(
        net, criterion=nn.CrossEntropyLoss, optimizer=ng.KFAC, optimizer__likelihood=ng.Categorical(),
        optimizer__lr=0.3, optimizer__search=ng.KLClip(0.1), batch_size=BATCH, max_epochs=1, train_split=None,
        verbose=0, **options,
    )  # fmt: skip
    estimator.fit(X.numpy(), Y.numpy())
    return estimator.module_, estimator.optimizer_


def with_hugging_face(compiled: bool, form: str = "factory") -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32))
    tokens = torch.randint(32, (24, 12))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    options = {"torch_compile": True, "torch_compile_backend": BACKEND} if compiled else {}
    arguments = transformers.TrainingArguments(
        FOLDER[0], max_steps=3, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
        **options,
    )  # fmt: skip
    settings = {"lr": 0.3, "search": ng.KLClip(0.01)}
    chosen: Any = (ng.KFAC, settings | {"likelihood": ng.Categorical()})
    if form == "factory":

        class Factory:
            def __call__(self, model: nn.Module, **settings: Any) -> Any:
                return ng.KFAC(model, ng.Categorical(), **settings)

        chosen = (Factory, settings)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)
    if form == "class":
        trainer.create_optimizer().attach(model)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    accelerate.state.AcceleratorState._reset_state(True)
    return model, trainer.optimizer.optimizer


TRAINERS = {
    "accelerate": with_accelerate,
    "lightning": with_lightning,
    "skorch": with_skorch,
    "hugging face, factory": with_hugging_face,
    "hugging face, class": lambda compiled: with_hugging_face(compiled, "class"),
}


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path: Any) -> Iterator[None]:
    FOLDER[:] = [str(tmp_path)]
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_compiled_training_is_that_of_the_plain_model(trainer):
    plain, reference = TRAINERS[trainer](False)
    torch._dynamo.reset()  # other tests may have compiled torch's own modules as often as the compiler allows
    counters.clear()
    model, optimizer = TRAINERS[trainer](True)
    assert counters["aot_autograd"]["ok"] >= 1  # something was compiled
    assert [row.reason for row in optimizer.coverage()] == [row.reason for row in reference.coverage()]
    exact = next(plain.parameters()).dtype == torch.float64
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, **({"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-3, "atol": 1e-5}))
