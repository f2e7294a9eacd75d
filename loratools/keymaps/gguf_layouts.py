"""How llama.cpp lays out weights that checkpoints store otherwise: one function a layout.

Each takes the base's hyper-parameters and the block's number and returns steps (``gguf_ops``).
Source of the facts: llama.cpp ``conversion/*.py``; tests compare with it weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.errors import MatchError
from loratools.keymaps.gguf_config import BaseConfig
from loratools.keymaps.gguf_ops import (
    At,
    Columns,
    Fuse,
    Heads,
    Op,
    Order,
    Oriented,
    Rows,
    RowScale,
    Scale,
    Split,
    Turn,
)

Ops = tuple[Op, ...]
Block = int | None


# ── orders of rows ───────────────────────────────────────────────────────────────────────────


def _grid(rows: int, *shape: int) -> Tensor:
    """Return 0 ... rows − 1 in a shape, one extent of which may be −1."""
    known = 1
    for extent in shape:
        known *= abs(extent)
    if rows % known:
        raise MatchError(f"{rows} rows are no {' × '.join(str(n) for n in shape if n > 0)} blocks")
    return torch.arange(rows).reshape(shape)


def _interleaved(heads: int) -> Order:
    """Rotary halves of every head become neighbouring pairs."""
    return lambda rows: _grid(rows, heads, 2, -1).transpose(1, 2).flatten()


def _separated(heads: int, turning: int) -> Order:
    """Neighbouring pairs among the first ``turning`` rows of every head become halves."""

    def order(rows: int) -> Tensor:
        head = _grid(rows, heads, -1)
        turned, still = head[:, :turning], head[:, turning:]
        return torch.cat([turned[:, ::2], turned[:, 1::2], still], dim=1).flatten()

    return order


def _grouped(groups: int, queries: int) -> Order:
    """Groups of (queries, key, value) heads become all queries, all keys, all values."""

    def order(rows: int) -> Tensor:
        group = _grid(rows, groups, queries + 2, -1)
        return torch.cat([group[:, :-2].flatten(), group[:, -2].flatten(), group[:, -1].flatten()])

    return order


def _tiled(groups: int, each: int) -> Order:
    """(group, member) blocks become (member, group) blocks."""
    return lambda rows: _grid(rows, groups, each, -1).transpose(0, 1).flatten()


def _after(start: int, order: Order) -> Order:
    """Leave the first ``start`` rows, and order the others."""
    return lambda rows: torch.cat([torch.arange(start), start + order(rows - start)])


# ── rotary embeddings ────────────────────────────────────────────────────────────────────────


def rotary_q(config: BaseConfig, block: Block) -> Ops:
    """Queries whose checkpoint has the halves of a head where llama.cpp wants pairs."""
    return (Rows(_interleaved(config.heads(block))),)


def rotary_k(config: BaseConfig, block: Block) -> Ops:
    """Keys of the same kind."""
    return (Rows(_interleaved(config.kv_heads(block))),)


def rotary_k_divided(config: BaseConfig, block: Block) -> Ops:
    """Keys as the converters of Baichuan and Xverse count their heads."""
    return (Rows(_interleaved(_divided(config, block))),)


def _divided(config: BaseConfig, block: Block) -> int:
    heads, keys = config.heads(block), config.kv_heads(block)
    return heads if heads == keys else heads // keys


def mrope_q(config: BaseConfig, block: Block) -> Ops:
    """GLM-4V: pairs become halves, in the part of a head that turns."""
    return _mrope(config, config.heads(block))


def mrope_k(config: BaseConfig, block: Block) -> Ops:
    """Keys of the same kind."""
    return _mrope(config, config.kv_heads(block))


def _mrope(config: BaseConfig, heads: int) -> Ops:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    sections = rope.get("mrope_section") or config.get("rope_sections")
    if not sections:
        return ()
    size = config.head_size(None)
    turning = config.get("rope_dimensions") or int(size * rope.get("partial_rotary_factor", 0.5))
    return (Rows(_separated(heads, turning)),)


# ── fused projections ────────────────────────────────────────────────────────────────────────


def halves(config: BaseConfig, block: Block) -> Ops:
    """Two projections of equal size, one below the other."""
    return (Split(count=2),)


def thirds(config: BaseConfig, block: Block) -> Ops:
    """Baichuan: query, key and value, of which the first two turn."""
    heads = config.heads(block)
    q, k = Rows(_interleaved(heads)), Rows(_interleaved(_divided(config, block)))
    return (Split(count=3), At(0, q), At(1, k))


def quarters(config: BaseConfig, block: Block) -> Ops:
    """Four projections of equal size."""
    return (Split(count=4),)


def _qkv_sizes(config: BaseConfig, block: Block) -> tuple[int, int, int]:
    size, keys = config.head_size(block), config.kv_heads(block)
    return (config.heads(block) * size, keys * size, keys * size)


def qkv(config: BaseConfig, block: Block) -> Ops:
    """Query, key and value one below the other."""
    return (Split(_qkv_sizes(config, block)),)


def qkv_rotary(config: BaseConfig, block: Block) -> Ops:
    """The same, where query and key turn."""
    q, k = rotary_q(config, block)[0], rotary_k(config, block)[0]
    assert isinstance(q, Rows)
    assert isinstance(k, Rows)
    return (*qkv(config, block), At(0, q), At(1, k))


def qkv_grouped(config: BaseConfig, block: Block) -> Ops:
    """InternLM2: each key head's queries, the key and the value together."""
    keys = config.kv_heads(block)
    return (Rows(_grouped(keys, config.heads(block) // keys)), *qkv_rotary(config, block))


def qkv_fusing(config: BaseConfig, block: Block) -> Ops:
    """RuGPT3XL: three projections become one."""
    return (Fuse(_qkv_sizes(config, block)),)


def heads_of_three(config: BaseConfig, block: Block) -> Ops:
    """Bloom, GPT-NeoX: each head's query, key and value together."""
    return (Rows(_tiled(config.heads(block), 3)),)


def falcon_groups(config: BaseConfig, block: Block) -> Ops:
    """Falcon: each key head's queries, the key and the value together; one key head by default."""
    keys = config.get("num_key_value_heads", block) or 1
    return (Rows(_grouped(keys, config.heads(block) // keys)),)


def plamo_q(config: BaseConfig, block: Block) -> Ops:
    """PLaMo: 8 groups of 5 heads become 5 groups of 8, in the one size there is."""
    return (Rows(_tiled(8, 5)),)


def plamo_o(config: BaseConfig, block: Block) -> Ops:
    """The same, on the side of the inputs."""
    return (Columns(_tiled(8, 5)),)


def indexer_qk(config: BaseConfig, block: Block) -> Ops:
    """Qwen4Exp: queries of several heads and one key."""
    size = config.number("indexer_head_dim")
    return (Split((config.number("indexer_n_heads") * size, size)),)


# ── linear attention ─────────────────────────────────────────────────────────────────────────


def _linear(config: BaseConfig) -> tuple[int, int, int, int]:
    """Return (key heads, values for each, length of a key, length of a value)."""
    keys = config.number("linear_num_key_heads")
    each = config.number("linear_num_value_heads") // keys
    return keys, each, config.number("linear_key_head_dim"), config.number("linear_value_head_dim")


def qkvz(config: BaseConfig, block: Block) -> Ops:
    """Qwen3-Next: each key head's q, k, values and gates together."""
    keys, each, key, value = _linear(config)

    def order(rows: int) -> Tensor:
        parts = _grid(rows, keys, -1).split([key, key, each * value, each * value], dim=1)
        return torch.cat([part.flatten() for part in parts])

    return (Rows(order), Split((keys * (2 * key + each * value), keys * each * value)))


def value_heads(config: BaseConfig, block: Block) -> Ops:
    """Qwen3.5: value heads, grouped by key head, are dealt out instead."""
    keys, each, _, _ = _linear(config)
    return () if each == 1 else (Rows(_tiled(keys, each)),)


def value_heads_after_keys(config: BaseConfig, block: Block) -> Ops:
    """The same, below queries and keys."""
    keys, each, key, _ = _linear(config)
    return () if each == 1 else (Rows(_after(2 * keys * key, _tiled(keys, each))),)


def value_heads_in(config: BaseConfig, block: Block) -> Ops:
    """The same, on the side of the inputs."""
    keys, each, _, _ = _linear(config)
    return () if each == 1 else (Columns(_tiled(keys, each)),)


# ── multi-head latent attention ──────────────────────────────────────────────────────────────


def latent_kv(config: BaseConfig, block: Block) -> Ops:
    """DeepSeek V2 and later: each head's key and value; keys are stored the other way round."""
    return _latent(config, config.kv_heads(block))


def latent_heads(config: BaseConfig, block: Block) -> Ops:
    """The same, where the number of query heads counts (GLM 5, Ling 3)."""
    return _latent(config, config.heads(block))


def _latent(config: BaseConfig, heads: int) -> Ops:
    key, value = config.number("qk_nope_head_dim"), config.number("v_head_dim")

    def order(rows: int) -> Tensor:
        parts = _grid(rows, heads, -1).split([key, value], dim=1)
        return torch.cat([part.flatten() for part in parts])

    split = Split((heads * key, heads * value))
    return (Rows(order), split, At(0, Heads(heads)), At(0, Turn()), At(1, Heads(heads)))


# ── experts ──────────────────────────────────────────────────────────────────────────────────


def experts_gate_up(config: BaseConfig, block: Block) -> Ops:
    """Gates and ups of all experts in one parameter, (experts, 2·f, hidden)."""
    return (*experts_in(config, block), Split(count=2))


def experts_in(config: BaseConfig, block: Block) -> Ops:
    """One projection of all experts, (experts, f, hidden)."""
    return (Oriented(config.number("hidden_size"), axis=2),)


def experts_down(config: BaseConfig, block: Block) -> Ops:
    """Downs of all experts, (experts, hidden, f)."""
    return (Oriented(config.number("hidden_size"), axis=1),)


def experts_gate_up_turned(config: BaseConfig, block: Block) -> Ops:
    """Llama 4: (experts, hidden, 2·f)."""
    return (Oriented(config.number("hidden_size"), axis=2, turned=True), Split(count=2))


def experts_gate_up_woven(config: BaseConfig, block: Block) -> Ops:
    """gpt-oss: (experts, hidden, 2·f), gates and ups taking turns."""
    unwoven = Rows(lambda rows: _grid(rows, -1, 2).T.flatten())
    return (Oriented(config.number("hidden_size"), axis=2, turned=True), unwoven, Split(count=2))


def experts_down_turned(config: BaseConfig, block: Block) -> Ops:
    """Llama 4, gpt-oss: (experts, f, hidden)."""
    return (Oriented(config.number("hidden_size"), axis=1, turned=True),)


def expert_rows(config: BaseConfig, block: Block) -> Ops:
    """DBRX: experts one below the other in one matrix."""
    return (Heads(_dbrx_experts(config)),)


def expert_rows_turned(config: BaseConfig, block: Block) -> Ops:
    """The same, each transposed."""
    return (Heads(_dbrx_experts(config)), Turn())


def _dbrx_experts(config: BaseConfig) -> int:
    ffn = config.get("ffn_config")
    count = ffn.get("moe_num_experts") if isinstance(ffn, dict) else None
    return int(count) if count else config.number("num_experts")


# ── scales ───────────────────────────────────────────────────────────────────────────────────


def negated_halves(config: BaseConfig, block: Block) -> Ops:
    """Talkie: the second half of every head changes its sign."""
    size = config.number("head_dim")
    sign = torch.cat([torch.ones(size // 2), -torch.ones(size - size // 2)])
    return (RowScale(lambda rows: sign.repeat(rows // size)),)


def turned(config: BaseConfig, block: Block) -> Ops:
    """A matrix stored (in, out)."""
    return (Turn(),)


def rescaled(config: BaseConfig, block: Block) -> Ops:
    """RWKV 6: divided by 2 every few blocks, against overflow in half precision."""
    every = config.get("rescale_every") or 0
    return (Scale(0.5 ** ((block or 0) // every)),) if every > 0 else ()


def jais_embedding(config: BaseConfig, block: Block) -> Ops:
    """Jais: the embedding's multiplier."""
    word = next((w for w in ("mup_embeddings_scale", "embeddings_scale") if config.get(w)), None)
    return (Scale(config.factor(word)),) if word else ()


def jais_output(config: BaseConfig, block: Block) -> Ops:
    """Jais: the head's multiplier."""
    if config.get("mup_output_alpha"):
        return (Scale(config.factor("mup_output_alpha") * config.factor("mup_width_scale")),)
    return (Scale(config.factor("width_scale")),) if config.get("width_scale") else ()


def multiplied(*words: str, place: int | None = None) -> Callable[[BaseConfig, Block], Ops]:
    """Return a layout that multiplies by config values; ``place``: an item of a list of them."""

    def layout(config: BaseConfig, block: Block) -> Ops:
        factor = 1.0
        for word in words:
            factor *= config.factor(word, place)
        return (Scale(factor),)

    return layout


def falcon_h1_in(config: BaseConfig, block: Block) -> Ops:
    """Falcon-H1: a multiplier for each of the five parts of a state-space block's input."""
    inner, state = (
        config.number("mamba_d_ssm"),
        config.number("mamba_n_groups") * config.number("mamba_d_state"),
    )
    factors = [config.factor("ssm_multipliers", place) for place in range(5)]
    whole = config.factor("ssm_in_multiplier")

    def scale(rows: int) -> Tensor:
        sizes = (inner, inner, state, state, rows - 2 * inner - 2 * state)
        parts = [torch.full((n,), whole * f) for n, f in zip(sizes, factors, strict=True)]
        return torch.cat(parts)

    return (RowScale(scale),)
