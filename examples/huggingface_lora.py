"""K-FAC for LoRA adapters (peft) in the Trainer of Hugging Face: from source code to prose, one character at a time.

A small Llama learns the sources of Python's standard library, then its adapters the text of Python's manual. Beside
K-FAC AdamW as the Trainer makes it, at GRID's learning rates, for as many steps.

    python examples/huggingface_lora.py
"""

from __future__ import annotations

from copy import deepcopy
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import natgrad as ng
from natgrad.tasks.stdlib import ALPHABET, character_windows, encode

GRID, LENGTH = (1e-2, 3e-2, 1e-1), 32
Rows = list[dict[str, Any]]


class Factory:  # what is no optimizer class, the Trainer makes without arguments and calls with the model
    def __call__(self, model: nn.Module) -> ng.KFAC:
        return ng.KFAC(model, ng.Categorical(), lr=0.3, search=ng.KLClip(1e-2))


def code_and_prose() -> list[Rows]:
    """Windows of source code; of the manual, to train on; and of the manual, held back."""
    manual = encode("\n".join(topics.values())[:40_000]).unfold(0, LENGTH, LENGTH)
    parts = character_windows(40_000, LENGTH - 1)[0], manual[:1000], manual[1000:]
    return [[{"input_ids": window, "labels": window} for window in part] for part in parts]


def llama() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    size |= {"vocab_size": len(ALPHABET), "initializer_range": 0.15}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(0)
    return get_peft_model(deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))  # type: ignore


def trainer(model: nn.Module, rows: Rows, out: str, optimizer: Any = None, **settings: Any) -> transformers.Trainer:
    usual = {"max_steps": 30, "per_device_train_batch_size": 32, "use_cpu": True}
    usual |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"} | settings
    args = transformers.TrainingArguments(out, **usual)
    run = transformers.Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
    run.remove_callback(transformers.PrinterCallback)
    return run


def main() -> dict[str, list[float]]:
    """Train, print and return the losses on the manual's two parts."""
    (code, *prose), model = code_and_prose(), llama()
    with TemporaryDirectory() as out:
        trainer(model, code, out, (Factory, {})).train()
        runs = {f"AdamW {lr}": trainer(adapted(model), prose[0], out, learning_rate=lr) for lr in GRID}
        runs["K-FAC"] = trainer(adapted(model), prose[0], out, (Factory, {}))
        for run in runs.values():
            torch.manual_seed(0)  # the same batches in the same order
            run.train()
        found = {name: [run.evaluate(rows)["eval_loss"] for rows in prose] for name, run in runs.items()}
    for name, losses in found.items():
        print(f"{name}: {losses[0]:.3f} nats per character in training, {losses[1]:.3f} held out")
    return found


if __name__ == "__main__":
    main()
