"""Every model of the zoo, and every published one, as ``natgrad inspect --strict`` judges it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rows_oracle import checked_rows, normal, parameter_names
from test_published_models import COMMON, MODELS, TEXT, built, gpt2, llama
from torch import nn
from typer.testing import CliRunner

import natgrad as ng
from natgrad.cli.app import app
from natgrad.testing import zoo

transformers: Any = pytest.importorskip("transformers")

# What no rule serves, by name: a weight that is applied by a function of another module, and experts in one tensor.
REFUSED = {
    "tied_head": {"embedding.weight": "also used outside its module?"},
    "mixtral": {
        f"model.layers.0.mlp.experts.{n}": "fused in one tensor; one nn.Linear per expert would have one"
        for n in ("gate_up_proj", "down_proj")
    },
}


# Layers that do not see one row per example, which only expand can do without.
NOT_BY_EXAMPLE = {
    "experts": {f"experts.{i}.{n}": "tokens routed to an expert" for i in (0, 1) for n in ("weight", "bias")},
    "positional": {"position.weight": "a table of positions"},
    "time_first": {f"{m}.{n}": "is not the batch" for m in ("stem", "head") for n in ("weight", "bias")},
}


def passes(model: nn.Module, x: Any, expected: Mapping[str, str], structure: Any = "kfac") -> ng.planning.Inspection:
    found = ng.inspect(model, structure, inputs=x)
    assert {row.name for row in found.uncovered} == expected.keys()
    assert all(expected[row.name] in row.reason for row in found.uncovered)
    assert {row.name for row in found.layers if row.rows == 0} <= {"expert", "experts.2"}
    return found


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_zoo_is_covered(name, sharing):
    case = zoo.case(name)
    expected = REFUSED.get(name, {}) | (NOT_BY_EXAMPLE.get(name, {}) if sharing == "reduce" else {})
    found = passes(case.model, case.x, expected, ng.Kronecker(sharing))
    assert found.parameters == sum(p.numel() for p in case.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_covered(name):
    make, x, _ = MODELS[name]
    found = passes(built(make), x, REFUSED.get(name, {}))
    diagonal = {row.name for row in found.layers if row.treatment != "Kronecker"} - REFUSED.get(name, {}).keys()
    assert all("norm" in layer.lower().replace("ln_", "norm") for layer in diagonal)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's call
@pytest.mark.parametrize(("base", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "down_proj"])])
def test_adapters_are_covered(base, targets):
    peft: Any = pytest.importorskip("peft")
    make, x, _ = MODELS[base]
    options = {"r": 2, "target_modules": targets, "lora_dropout": 0.0, "fan_in_fan_out": base == "gpt2"}
    found = passes(built(lambda: peft.get_peft_model(make(), peft.LoraConfig(**options))), x, {})
    assert len(found.layers) == 2 * (len(targets) + (base == "gpt2")) and found.frozen > found.parameters
    assert {row.treatment for row in found.layers} == {"Kronecker"}


@pytest.mark.parametrize(
    ("model", "given"),
    [("gpt2", "ids:4"), ("llama", "ids:4"), ("bert", "ids:4"), ("vit", "3x4x4"), ("mixtral", "ids:4")],
)
def test_the_command(model, given, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    result = CliRunner().invoke(app, ["inspect", f"test_published_models.py:{model}", "--strict", "--input", given])
    assert result.exit_code == (model in REFUSED), result.output
    assert all(name in result.stderr for name in REFUSED.get(model, ()))


def test_what_depends_on_values_is_found_by_running_the_model_and_leaves_no_traces():
    """Routing of tokens has no shape without values; a norm of the batch has buffers."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.expert, self.other = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = (x[:, 0] > 0).nonzero()[:, 0]
            h = torch.nn.functional.dropout(self.norm(x), 0.5)
            return self.other(h.index_add(0, chosen, self.expert(h[chosen])))

    model, x = Routed(), torch.tensor([[1.0, 2, 3], [-1, 0, 1], [2, 1, 0], [-3, 1, 1], [1, 1, 4]])
    before, draws = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    found = ng.inspect(model, inputs=x)
    assert {row.name: row.rows for row in found.layers} == {"norm": 5, "expert": 3, "other": 5}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_structures_that_tell_examples_apart_name_the_tables_of_positions(make):
    found = ng.inspect(built(make), "ekfac", inputs=TEXT)
    assert [row.name for row in found.uncovered] == (["transformer.wpe.weight"] if make is gpt2 else [])
    assert all("table of positions" in row.reason for row in found.uncovered)


def test_positions_and_class_tokens_of_vision_transformers():
    """Their tables, behind dropout and with a token of distillation, are those of single examples."""
    sizes = {k: v for k, v in COMMON.items() if k != "vocab_size"} | {"hidden_size": 8, "intermediate_size": 10}
    image = {"image_size": 4, "patch_size": 2, "num_labels": 3, "hidden_dropout_prob": 0.3}
    for kind, tokens in (("ViT", set()), ("DeiT", {"deit.embeddings.distillation_token"})):
        config = getattr(transformers, f"{kind}Config")(**sizes, **image, attention_probs_dropout_prob=0.0)
        model = built(lambda kind=kind, config=config: getattr(transformers, f"{kind}ForImageClassification")(config))
        checked_rows(model, {"pixel_values": normal(3, 3, 4, 4)}, parameter_names(model) - tokens, 1e-8)
