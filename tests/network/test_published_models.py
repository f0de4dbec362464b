"""Models of transformers and adapters of peft, tiny and with random weights: what is covered, and by the right rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rows_oracle import checked_rows, normal, parameter_names, prepared
from torch import Tensor, nn

import natgrad as ng
from natgrad.network import cells
from natgrad.testing import oracles
from support import assert_close

transformers: Any = pytest.importorskip("transformers")

TOKENS = torch.tensor([[1, 2, 7, 2], [3, 9, 5, 0], [8, 0, 4, 10]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
LABELS = torch.where(MASK.bool(), TOKENS.roll(-1, 1), -100)
MASKED = ng.Weighted(ng.Categorical(), ignore_index=-100)
COMMON = {"attn_implementation": "eager", "vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = COMMON | {"hidden_size": 8, "intermediate_size": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 4, "use_cache": False}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2() -> nn.Module:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**COMMON, n_positions=8, n_embd=8, n_inner=10, use_cache=False, **quiet)
    )


def llama(tied: bool = False) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=tied))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **NO_DROPOUT, max_position_embeddings=8))


def vit() -> nn.Module:
    sizes = {k: v for k, v in SMALL.items() if not k.endswith("token_id") and k != "vocab_size"}
    config = transformers.ViTConfig(**sizes, **NO_DROPOUT, image_size=4, patch_size=2, num_labels=3)
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    sizes = {"vocab_size": 11, "d_model": 6, "d_kv": 3, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    more = {"use_cache": False, "decoder_start_token_id": 0, "tie_word_embeddings": True}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **more))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=3, experts_implementation="eager")
    return transformers.MixtralForCausalLM(config)


TEXT = {"input_ids": TOKENS}
POSITIONS = {"gpt2": "transformer.wpe.weight", "bert": "bert.embeddings.position_embeddings.weight"}
BIASES = {f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")}

# name: (model, input, parameters without a layer rule: called once for the batch, or in no layer)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], set[str]]] = {
    "gpt2": (gpt2, TEXT | {"attention_mask": MASK}, {POSITIONS["gpt2"]}),
    "llama": (llama, TEXT | {"attention_mask": MASK}, set()),
    "llama_tied": (lambda: llama(True), TEXT, set()),
    "mistral": (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER)), TEXT, set()),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)), TEXT, set()),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)), TEXT, set()),
    "gemma": (lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER)), TEXT, set()),
    "bert": (bert, TEXT | {"attention_mask": MASK}, {POSITIONS["bert"]}),
    "vit": (vit, {"pixel_values": normal(3, 3, 4, 4)}, set()),
    "t5": (t5, TEXT | {"decoder_input_ids": TOKENS.flip(1)}, BIASES),
    "mixtral": (
        mixtral,
        TEXT,
        {f"model.layers.0.mlp.{n}" for n in ("experts.gate_up_proj", "experts.down_proj")},
    ),
}
# ViT's gradients of keys are 1e-8 here, what is left of differences of larger numbers.
TOLERANCE = {"vit": 1e-8}
# Their norms work in float32 whatever the model's dtype is.
SINGLE = {"llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "t5", "mixtral"}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return prepared(make()).train()


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_published_models(name):
    make, x, without = MODELS[name]
    model = built(make)
    checked_rows(model, x, parameter_names(model) - without, 1e-5 if name in SINGLE else TOLERANCE.get(name, 1e-12))


def steps(model: nn.Module, x: dict[str, Tensor], opt: torch.optim.Optimizer, number: int = 4) -> list[float]:
    losses = []
    for _ in range(number):
        opt.zero_grad()
        f = model(**x).logits
        y = LABELS if f.dim() == 3 else torch.tensor([0, 2, 1])
        loss = F.cross_entropy(f.flatten(0, -2), y.flatten())
        observe: Any = opt
        observe.observe(f, y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


OPTIMIZERS = {
    "expand": lambda model: ng.KFAC(model, MASKED, lr=0.1),
    "reduce": lambda model: ng.NaturalGradient(
        model, MASKED, metric=ng.Fisher(ng.MonteCarlo(), ng.Kronecker.reduce()), lr=0.1, search=ng.KLClip(1e-2)
    ),
    "ekfac": lambda model: ng.EKFAC(model, MASKED, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_trained_with_what_is_not_covered_named(name, optimizer):
    make, x, without = MODELS[name]
    model = built(make)
    opt = OPTIMIZERS[optimizer](model)
    losses = steps(model, x, opt)
    assert losses[-1] < losses[0]
    rows = {row.parameter: row for row in opt.coverage()}
    norms = {n for n, row in rows.items() if "norm layer" in row.reason}
    assert all(row.shape == tuple(model.get_parameter(n).shape) for n, row in rows.items())
    assert {n for n, row in rows.items() if row.treatment == "Diagonal"} == without | norms
    assert norms == {n for n in rows if "norm" in n.lower().replace("ln_", "norm")}, norms


def linear_twin(model: nn.Module) -> nn.Module:
    """The model with every Conv1D replaced by the Linear layer that computes the same."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if type(module).__name__ == "Conv1D":
            layer = nn.Linear(module.nx, module.nf).double()
            with torch.no_grad():
                layer.weight.copy_(module.weight.T)
                layer.bias.copy_(module.bias)
            owner, _, own = name.rpartition(".")
            setattr(twin.get_submodule(owner), own, layer)
    return twin


@pytest.mark.parametrize(
    "structure",
    [ng.Kronecker(), ng.Kronecker.reduce(), ng.EigenKronecker(), ng.BlockDiagonal(), ng.Diagonal()],
    ids=str,
)
def test_conv1d_is_a_linear_layer_whose_weight_is_stored_the_other_way(structure):
    model = built(gpt2)
    twin, x = linear_twin(model), TEXT | {"attention_mask": MASK}
    images = []
    vectors = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    turned = {n for n, p in twin.named_parameters() if p.shape != vectors[n].shape or ("c_" in n and "weight" in n)}
    for network in (model, twin):
        draws = torch.Generator().manual_seed(0)
        got = ng.fisher(network, MASKED, x, LABELS, structure=structure, generator=draws)
        v = {n: t.T if network is twin and n in turned else t for n, t in vectors.items()}
        flat = torch.cat([v[n].reshape(-1) for n, _ in network.named_parameters()])
        out = got.partition.unpack(got.partition.split(got @ flat))
        images.append({n: t.T if network is twin and n in turned else t for n, t in out.items()})
    assert len(turned) == 4
    for name, image in images[0].items():
        assert_close(image, images[1][name], 1e-9)


@pytest.mark.parametrize("structure", [ng.Gram(), ng.Dense(), ng.MatrixFree()], ids=str)
def test_the_whole_matrix_of_a_tied_masked_model(structure):
    """GPT-2 with padding, ignored labels and a tied head, against the dense Jacobian."""
    model = built(gpt2)
    x = TEXT | {"attention_mask": MASK}
    jacobian = oracles.jacobian(model, x, lambda out: out.logits)
    p = model(**x).logits.detach().softmax(-1)
    weights = (LABELS != -100).double()
    exact = oracles.exact_fisher(jacobian, torch.diag_embed(p) - p[..., None] * p[..., None, :], weights)
    got = ng.fisher(model, MASKED, x, LABELS, structure=structure)
    v = normal(len(exact))
    assert_close(got @ v, exact @ v, 1e-10)
    assert_close(got.trace() if structure != ng.MatrixFree() else exact.trace(), exact.trace(), 1e-10)


def test_fused_experts_are_refused_by_name():
    reasons = {c.name: c.reason for c in cells(built(mixtral)) if c.module is None}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"] == (
        "no layer rule for MixtralExperts: its experts are fused in one tensor; one nn.Linear per expert would have one"
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's call
@pytest.mark.parametrize(("base", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "down_proj"])])
def test_adapters_of_low_rank(base, targets):
    """peft's LoRA on Conv1D and on Linear: two Linear layers each, and nothing else is trained."""
    peft: Any = pytest.importorskip("peft")
    make, x, _ = MODELS[base]
    options = {"r": 2, "target_modules": targets, "lora_dropout": 0.0, "fan_in_fan_out": base == "gpt2"}
    model = built(lambda: peft.get_peft_model(make(), peft.LoraConfig(**options)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    checked_rows(model, x, trained, 1e-5 if base in SINGLE else 1e-12)
    opt = ng.EKFAC(model, MASKED, lr=0.1)
    losses = steps(model, x, opt)
    assert losses[-1] < losses[0] and {row.treatment for row in opt.coverage()} == {"EigenKronecker"}
