"""K-FAC in the Trainer of Hugging Face: a small vision transformer on the digits of scikit-learn.

Beside it AdamW as the Trainer makes it, at the best of GRID's learning rates, for as many steps.

    python examples/huggingface_trainer.py
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn

import natgrad as ng

GRID = (3e-3, 1e-2, 3e-2)
SETTINGS = {"likelihood": ng.Categorical(), "lr": 0.3, "search": ng.KLClip(3e-3)}
Rows = list[dict[str, Any]]


def digits() -> tuple[Rows, Rows]:
    """1,400 images to train on and 397 held back."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"pixel_values": x[i], "labels": int(labels[i])} for i in order]
    return rows[:1400], rows[1400:]


def network() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = size | {"image_size": 8, "patch_size": 4, "num_channels": 1, "vision_use_head": False}
    return transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=vision, num_labels=10))


class Factory:
    """What is no optimizer class, the Trainer makes without arguments and calls with the model."""

    def __call__(self, model: nn.Module, **settings: Any) -> ng.KFAC:
        return ng.KFAC(model, **settings)


def trainer(rows: Rows, out: str, optimizer: Any = None, **settings: Any) -> transformers.Trainer:
    usual = {"max_steps": 40, "per_device_train_batch_size": 64, "weight_decay": 0.01, "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(out, **usual | quiet | settings)
    run = transformers.Trainer(network(), arguments, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
    run.remove_callback(transformers.PrinterCallback)
    if optimizer is not None and optimizer[0] is not Factory:
        # A class gets groups of parameters from the Trainer (biases and norms do not decay), but not the model.
        run.create_optimizer().attach(run.model)
    return run


def train(run: transformers.Trainer, data: tuple[Rows, Rows], checkpoint: str | None = None) -> list[float]:
    """The losses on the images trained on and on those held back."""
    run.train(resume_from_checkpoint=checkpoint)
    return [run.evaluate(rows)["eval_loss"] for rows in data]


def main() -> dict[str, list[float]]:
    """Train, print and return the two losses of each run."""
    data, kfac, saving = digits(), (ng.KFAC, SETTINGS), {"save_strategy": "steps", "save_steps": 20}
    with TemporaryDirectory() as out:
        found = {"AdamW": min(train(trainer(data[0], out, learning_rate=lr), data) for lr in GRID)}
        found["K-FAC, factory"] = train(trainer(data[0], out, (Factory, SETTINGS)), data)
        found["K-FAC"] = train(trainer(data[0], out, kfac, **saving), data)
        found["K-FAC, resumed"] = train(trainer(data[0], out, kfac, **saving), data, f"{out}/checkpoint-20")
    for name, (loss, held_out) in found.items():
        print(f"{name}: training loss {loss:.3f}, held-out loss {held_out:.3f}")
    return found


if __name__ == "__main__":
    main()
