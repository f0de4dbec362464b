"""Hugging Face's Trainer: both forms of its optimizer argument, resuming, its hooks, and LoRA adapters of peft."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
from test_examples import load  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

example, lora = load("huggingface_trainer"), load("huggingface_lora")
# Statistics and inverses are not due at every step, so that a resumed run must know where in their schedule it stands.
KFAC = (ng.KFAC, example.SETTINGS | {"refresh": ng.Refresh(2, 4), "momentum": 0.5})
FACTORY = (example.Factory, KFAC[1])
SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """accelerate keeps its settings, mixed precision too, for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def rows() -> Any:
    return example.digits()[0][:320]


def trained(rows: Any, out: Path, optimizer: Any, checkpoint: str | None = None, **settings: Any) -> Any:
    run = example.trainer(rows, str(out), optimizer, **{"max_steps": 6, "per_device_train_batch_size": 32} | settings)
    run.train(resume_from_checkpoint=checkpoint)
    return run


def optimizer_of(run: Any) -> Any:
    """What is behind accelerate's wrapper."""
    return run.optimizer.optimizer


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_kfac_ends_below_adamw_at_its_best_rate_and_resumes_exactly():
    losses = example.main()
    for form in ("K-FAC", "K-FAC, factory"):
        assert losses[form][0] < 0.5 * losses["AdamW"][0], form
        assert losses[form][1] < losses["AdamW"][1], form
    assert losses["K-FAC, resumed"] == losses["K-FAC"]


def test_kfac_adapts_a_language_model_further_than_adamw_at_its_best_rate():
    losses = lora.main()
    adamw = [losses[f"AdamW {lr}"] for lr in lora.GRID]
    assert min(adamw) not in (adamw[0], adamw[-1])  # the best rate is inside the grid
    assert losses["K-FAC"][0] < min(adamw)[0] - 0.03
    assert losses["K-FAC"][1] < min(adamw)[1]


@pytest.mark.parametrize("optimizer", [KFAC, FACTORY], ids=["class", "factory"])
def test_resume_is_bitwise_and_needs_the_state(rows, tmp_path, optimizer):
    whole = trained(rows, tmp_path, optimizer, **SAVING)
    checkpoint = tmp_path / "checkpoint-3"
    again = trained(rows, tmp_path, optimizer, str(checkpoint), **SAVING)
    assert same(whole.model, again.model)
    state, resumed = optimizer_of(whole).state_dict()["state"], optimizer_of(again).state_dict()["state"]
    assert state.keys() == resumed.keys()
    for index, tensors in state.items():
        assert tensors.keys() == resumed[index].keys()
        assert all(torch.equal(t, resumed[index][key]) for key, t in tensors.items())

    stateless = tmp_path / "stateless"
    shutil.copytree(checkpoint, stateless)
    (stateless / "optimizer.pt").unlink()
    assert not same(whole.model, trained(rows, tmp_path, optimizer, str(stateless), **SAVING).model)


def test_the_saved_state_is_plain(rows, tmp_path):
    trained(rows, tmp_path, KFAC, **SAVING)
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert saved["state"]
    for tensors in saved["state"].values():
        assert all(type(t) is Tensor for t in tensors.values())
    for group in saved["param_groups"]:
        assert all(isinstance(v, (int, float, str, bool, list, type(None))) for v in group.values()), group


def test_groups_of_the_trainer_do_not_divide_layers(rows, tmp_path):
    run = trained(rows, tmp_path, KFAC, max_steps=1, weight_decay=0.1)
    optimizer = optimizer_of(run)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named, blocks = dict(run.model.named_parameters()), {row.parameter: row.block for row in optimizer.coverage()}
    assert blocks.keys() == named.keys()
    biases = [name for name in blocks if name.endswith("proj.bias") or name == "classifier.bias"]
    assert len(biases) == 9
    for bias in biases:
        weight = bias.removesuffix("bias") + "weight"
        assert decays[id(named[bias])] == 0 and decays[id(named[weight])] == 0.1
        assert blocks[bias] == blocks[weight] == bias.removesuffix(".bias")


def test_gradients_are_clipped_and_the_schedule_is_followed(rows, tmp_path):
    seen: list[tuple[float, list[float]]] = []
    hooked: list[int] = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
            seen.append((float(norm), [group["lr"] for group in kwargs["optimizer"].param_groups]))

    settings = example.SETTINGS | {"search": ng.LearningRate()}
    run = example.trainer(rows, str(tmp_path), (ng.KFAC, settings), max_steps=4, max_grad_norm=1e-3)
    run.add_callback(Watch())
    run.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: hooked.append(1))
    before = parameters(run.model)
    run.train()
    assert len(seen) == len(hooked) == 4
    for k, (norm, rates) in enumerate(seen):
        assert norm == pytest.approx(1e-3, rel=1e-3)
        assert rates == pytest.approx([0.3 * (1 - k / 4)] * 2)
    # Nothing but the clipped gradient is preconditioned: damping bounds the inverse by 1/λ.
    change = max(float((p - before[name]).norm()) for name, p in parameters(run.model).items())
    assert 0 < change <= 4 * 0.3 * 1e-3 / 1e-3


def test_accumulated_micro_batches_are_the_batch(rows, tmp_path):
    exact = (example.Factory, example.SETTINGS | {"estimate": ng.Exact()})

    def after(size: int, parts: int) -> dict[str, Tensor]:
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        run = example.trainer(rows, str(tmp_path), exact, max_steps=3, **settings)
        # Called once for all images of a micro-batch: what it sees is not the same in parts and in whole.
        run.model.vision_model.embeddings.position_embedding.requires_grad_(False)
        run.train()
        return parameters(run.model)

    whole, parts, alone = after(32, 1), after(16, 2), after(16, 1)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    assert max(float((p - alone[name]).abs().max()) for name, p in whole.items()) > 1e-2


def test_evaluation_in_between_changes_nothing(rows, tmp_path):
    class Evaluating(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses.append(watched.evaluate(rows[:50])["eval_loss"])

    losses: list[float] = []
    plain = trained(rows, tmp_path, KFAC)
    watched = example.trainer(rows, str(tmp_path), KFAC, max_steps=6, per_device_train_batch_size=32)
    watched.add_callback(Evaluating())
    watched.train()
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert same(plain.model, watched.model)


def test_bfloat16_autocast(rows, tmp_path):
    run = example.trainer(rows, str(tmp_path), KFAC, max_steps=6, bf16=True)
    before = run.evaluate(rows)["eval_loss"]
    run.train()
    assert run.evaluate(rows)["eval_loss"] < 0.7 * before
    assert all(t.dtype == torch.float32 for tensors in optimizer_of(run).state.values() for t in tensors.values())


@pytest.mark.parametrize("form", ["factory", "class"])
def test_only_adapters_train_and_each_is_covered(tmp_path, form):
    _, prose, _ = lora.code_and_prose()
    model = lora.adapted(lora.llama())
    before = parameters(model)
    if form == "factory":
        run = lora.trainer(model, prose, str(tmp_path), (lora.Factory, {}), max_steps=3)
    else:  # no adapter is free of decay: one of the Trainer's two groups is empty
        run = lora.trainer(model, prose, str(tmp_path), (ng.KFAC, {"likelihood": ng.Categorical()}))
        run.args.max_steps = 3
        run.create_optimizer().attach(model)
    run.train()
    adapters = {name for name in before if "lora_" in name}
    assert len(adapters) == 6
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in adapters)
        assert torch.equal(p, before[name]) != (name in adapters), name
    coverage = optimizer_of(run).coverage()
    assert {row.parameter for row in coverage} == adapters
    assert all(row.treatment == "Kronecker" and not row.reason for row in coverage)


class Padded(transformers.Trainer):
    """Tells the optimizer which logits the loss is made of: those before a label that counts."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
            self.optimizer.optimizer.observe(outputs.logits, shifted)  # type: ignore[union-attr]
        return (loss, outputs) if return_outputs else loss


def test_padding_is_left_out_where_the_loss_says_so(tmp_path):
    _, prose, _ = lora.code_and_prose()

    def after(padding: int, kind: type, likelihood: ng.likelihood.Likelihood) -> dict[str, Tensor]:
        rows = []
        for row in prose[:64]:
            tokens, labels = row["input_ids"].clone(), row["labels"].clone()
            tokens[-8:], labels[-8:] = padding, -100
            rows.append({"input_ids": tokens, "labels": labels})
        model = lora.llama()
        settings = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, seed=0, **settings)
        opt = ng.KFAC(model, likelihood, lr=0.3, search=ng.KLClip(1e-2))
        kind(model, arguments, train_dataset=rows, optimizers=(opt, None)).train()
        return parameters(model)

    def difference(kind: type, likelihood: ng.likelihood.Likelihood) -> float:
        a, b = (after(padding, kind, likelihood) for padding in (0, 5))
        return max(float((p - b[name]).abs().max()) for name, p in a.items())

    assert difference(Padded, ng.Weighted(ng.Categorical(), ignore_index=-100)) < 1e-4
    assert difference(transformers.Trainer, ng.Categorical()) > 1e-2
