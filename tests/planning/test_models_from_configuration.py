"""Published models far larger than this machine, from their configurations alone."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

import natgrad as ng
from natgrad.planning import Profile, plan

transformers: Any = pytest.importorskip("transformers")

RATES = {"16": 1e-5, "1024": 1e-3}
FAST = Profile("a made-up device", "0", {"float32": {"8,8": 1e14}}, RATES, RATES, RATES, {"65536": 1e12}, 1e-6)
WIDTH, INNER, DEPTH, VOCABULARY, KEYS = 8192, 28672, 80, 32000, 1024


@pytest.fixture(scope="module")
def llama() -> Any:
    """Llama 2 with 70 billion parameters, whose weights would fill 276 GB."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=DEPTH,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_planned_in_seconds(llama):
    started = time.perf_counter()
    found = plan(llama, batch=8, tokens=4096, max_overhead=0.1, max_memory="0.8x-adam", profile=FAST)
    assert time.perf_counter() - started < 90  # ten seconds; the bound is for busy machines
    assert found.parameters == 2 * VOCABULARY * WIDTH + WIDTH + DEPTH * (
        2 * WIDTH**2 + 2 * KEYS * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
    )
    best = found.best
    assert best is not None and best.name == "kfac" and best.overhead <= 0.1 and best.state <= 0.8 * found.adam
    assert best.block == 1024 and "ng.WidthLimits(full=1024, block=1024)" in best.code
    possible = [c for c in found.choices if math.isfinite(c.ratio)]
    assert {c.name for c in possible} == {"kfac", "ekfac", "diagonal", "gram", "matrix-free"}
    for choice in possible:
        assert 0 < choice.state < 10e12 and math.isfinite(choice.transient) and math.isfinite(choice.seconds)


def test_every_layer_is_shown_with_what_it_gets(llama):
    found = ng.inspect(llama, batch=8, tokens=4096)
    rows = {row.name: row for row in found.layers}
    assert len(rows) == 2 + 1 + DEPTH * 9 and found.uncovered == ()
    gets = {
        "model.embed_tokens": "diagonal 32000 × 8192²",
        "model.layers.79.self_attn.q_proj": "8192² × 8192²",
        "model.layers.79.self_attn.k_proj": "8192² × 1024²",
        "model.layers.79.mlp.up_proj": "8192² × 28·1024²",
        "model.layers.79.mlp.down_proj": "28·1024² × 8192²",
        "model.layers.79.input_layernorm": "diagonal 8192",
        "lm_head": "8192² × (31·1008² + 752²)",
    }
    assert {name: rows[name].factors for name in gets} == gets
    assert "blocks of 1024" in rows["model.layers.0.mlp.up_proj"].reason
    # Two moments in float32, their inverses, and a weight of each moment.
    assert rows["model.layers.0.self_attn.k_proj"].state == 4 * (2 * (WIDTH**2 + KEYS**2) + 2)
    assert found.state == sum(row.state for row in found.layers)


def test_a_pass_on_indices_counts_attention_too(llama):
    ids = {"input_ids": torch.zeros(2, 64, dtype=torch.long, device="meta")}
    found = ng.inspect(llama, inputs=ids)
    assert found.seen and (found.batch, found.tokens) == (2, 64)
    assert {row.rows for row in found.layers} == {128}
