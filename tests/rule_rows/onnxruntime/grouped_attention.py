"""Rows for the rules of `hyperclone_onnx.rules.onnxruntime.grouped_attention`."""

from __future__ import annotations

from typing import Any

import numpy as np

from rule_rows.harness import MICROSOFT, Model, activation, narrow, row
from rule_rows.onnxruntime.attention import fixed, place, scaled, sequences


def operands(m: Model, leading: tuple[int, ...], heads: int, kv: int, d: int) -> list[str]:
    """Packed queries, keys and values, or all three side by side."""
    letters = "." * len(leading) + "g"
    if m.coin(0.3):
        return [activation(m, (*leading, (heads + 2 * kv) * d), letters), "", ""]
    return [activation(m, (*leading, n * d), letters) for n in (heads, kv, kv)]


def turned(m: Model, inputs: list[str], index: int, half: int, offset: int = 0) -> dict[str, Any]:
    """Add rotary angles in some of the models."""
    if m.coin():
        return {}
    place(inputs, index, m.operand((16, half), "pg"))
    place(inputs, index + 1, m.operand((16, half), "pg"))
    turn = {"do_rotary": 1, "rotary_interleaved": m.size(0, 1)}
    return {**turn, "rotary_offset": offset} if offset else turn


@row("GroupQueryAttention", domain=MICROSOFT, seeds=20)
def group_query_attention(m: Model) -> None:
    group_query_row(m, 1, 1)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=8)
def group_query_attention_of_a_batch(m: Model) -> None:
    group_query_row(m, 2, 1)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=8)
def group_query_attention_of_a_prompt(m: Model) -> None:
    group_query_row(m, 1, 3)


def group_query_row(m: Model, b: int, s: int) -> None:
    m.opset, m.equal = 17, True
    kv, group, d = m.size(1, 3), m.size(1, 2), 16
    heads, past = kv * group, 2
    total = s + past
    inputs = operands(m, (b, s), heads, kv, d)
    inputs += [m.operand((b, kv, past, d), stored=False) for _ in range(2)]
    inputs += [fixed(m, np.full((b,), total - 1)), m.operand(np.asarray(total, np.int32), stored=True)]
    attributes = {**turned(m, inputs, 7, d // 2), **scaled(m)}
    if m.coin(0.3):
        place(inputs, 9, m.operand(np.tile(np.arange(past, total), (b, 1)), stored=False))
    if m.coin(0.3):
        place(inputs, 10, m.operand((*m.pick((1, 1), (b, heads), (1, heads)), s, total)))
    if m.coin(0.3):
        place(inputs, 11, m.operand((heads,), "." if heads == 1 else "g"))
    attributes |= m.pick({}, {"softcap": 4.0}, {"local_window_size": 2}, {"smooth_softmax": 1})
    attributes |= m.pick({}, {}, {"qk_output": 1}, {"qk_output": 2})
    narrow(m)
    m.node(
        "GroupQueryAttention",
        *inputs,
        outputs=4 if "qk_output" in attributes else 3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv,
        **attributes,
    )


@row("GroupQueryAttention", domain=MICROSOFT, seeds=10)
def group_query_attention_with_norms(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    b, s, kv, group, d, past = 2, m.size(), m.size(1, 3), m.size(1, 2), 2 * m.size(), 2
    heads = kv * group
    inputs = operands(m, (b, s), heads, kv, d)
    inputs += [m.operand((b, kv, past, d), "..pg", stored=False) for _ in range(2)]
    inputs += [fixed(m, np.full((b,), past + s - 1)), fixed(m, past + s)]
    attributes = {**turned(m, inputs, 7, d // 2), **scaled(m)}
    if m.coin(0.3):
        place(inputs, 11, m.operand((heads,)))
    place(inputs, 14, m.operand((d,), "g"))
    place(inputs, 15, m.operand((d,), "g"))
    attributes |= {"num_heads": heads, "kv_num_heads": kv}
    m.node("GroupQueryAttention", *inputs, outputs=3, domain=MICROSOFT, **attributes)


@row("SparseAttention", domain=MICROSOFT, seeds=12)
def sparse_attention(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    b, kv, group, d, layouts = 2, m.size(1, 2), m.size(1, 2), 2 * m.size(), m.pick(1, 1, 2)
    heads, block, capacity = kv * group * layouts, 16, 32
    past, s = m.pick((0, 20), (20, 1))
    total = past + s
    inputs = operands(m, (b, s), heads, kv, d)
    inputs += [m.operand((b, kv, capacity, d), "..pg", stored=False) for _ in range(2)]
    inputs.append(fixed(m, [[0, 1, 3], [0, 1, 2]][:layouts]))
    inputs.append(fixed(m, [[0, 0, 1], [0, 1, -1]][:layouts]))
    inputs += [fixed(m, [total]), fixed(m, [total] * b)]
    if m.coin():
        inputs += [m.operand((64, d // 2)), m.operand((64, d // 2))]
    attributes: dict[str, Any] = {"do_rotary": 1} if len(inputs) > 9 else {}
    attributes |= {"num_heads": heads, "kv_num_heads": kv, "sparse_block_size": block}
    m.node("SparseAttention", *inputs, outputs=3, domain=MICROSOFT, **attributes, **scaled(m))


def paged(m: Model) -> tuple[list[str], dict[str, Any], tuple[int, ...]]:
    """Operands, caches and tables of tokens of two sequences; (key/value heads, heads, head_dim, tokens, keys)."""
    m.equal, m.tolerance = True, 2e-6
    kv, group, d = m.size(1, 3), m.size(1, 2), 2 * m.size(3, 5)
    heads, past = kv * group, [m.size(0, 3) for _ in range(2)]
    _, ends = sequences(m)
    inputs = operands(m, (ends[-1],), heads, kv, d)
    inputs += [m.operand((7, 2, kv, d), "pp.g", stored=False) for _ in range(2)]
    inputs += [fixed(m, ends), fixed(m, past), fixed(m, [[0, 4, 2], [5, 1, 6]])]
    attributes = {"num_heads": heads, "kv_num_heads": kv, **scaled(m)}
    return inputs, attributes, (kv, heads, d, ends[-1], min(past) + 1)


@row("PagedAttention", domain=MICROSOFT, seeds=16)
def paged_attention(m: Model) -> None:
    inputs, attributes, (_, heads, d, *_) = paged(m)
    attributes |= turned(m, inputs, 8, *m.pick((d // 2,), (2,), (d // 2 - 1, 2)))
    if m.coin(0.3):
        place(inputs, 11, m.operand((heads,)))
    if m.coin():
        place(inputs, 12, m.operand((d,), "g"))
        place(inputs, 13, m.operand((d,), "g"))
    attributes |= m.pick({}, {"softcap": 4.0}, {"local_window_size": 2})
    m.node("PagedAttention", *inputs, outputs=3, domain=MICROSOFT, **attributes)


@row("SparsePagedAttention", domain=MICROSOFT, seeds=12)
def sparse_paged_attention(m: Model) -> None:
    inputs, attributes, (kv, heads, d, tokens, keys) = paged(m)
    source = m.pick("main", "auxiliary")
    size = keys if source == "main" else 3
    place(inputs, 9, fixed(m, np.tile(np.arange(size), (tokens, 1))))
    place(inputs, 10, fixed(m, np.full(tokens, size)))
    if source == "auxiliary":
        for index in (11, 12):
            place(inputs, index, m.operand((2, 3, kv, d), "pp.g", stored=False))
    attributes |= turned(m, inputs, 14, d // 2)
    if m.coin(0.3):
        place(inputs, 16, m.operand((heads,)))
    attributes["selected_kv_source"] = source
    m.node("SparsePagedAttention", *inputs, outputs=3, domain=MICROSOFT, **attributes)


@row("DynamicSparseAttention", domain=MICROSOFT, seeds=12)
def dynamic_sparse_attention(m: Model) -> None:
    m.equal, m.tolerance = True, 2e-6
    b, s, kv, group, d, past = 2, m.size(), m.size(1, 3), m.size(1, 2), 2 * m.size(3, 5), 2
    heads, source = kv * group, m.pick("main", "auxiliary")
    size = past if source == "main" else 3
    inputs = operands(m, (b, s), heads, kv, d)
    inputs += [m.operand((b, kv, past, d), "p.pg", stored=False) for _ in range(2)]
    inputs += [m.operand((b, kv, 3, d), "p.pg", stored=False) if source != "main" else "" for _ in range(2)]
    inputs += [fixed(m, np.tile(np.arange(size), (b * s, 1))), fixed(m, np.full(b * s, size))]
    inputs += [fixed(m, [past + s - 1] * b), fixed(m, past + s)]
    attributes = turned(m, inputs, 11, *m.pick((d // 2,), (2,), (d // 2 - 1, 2)))
    if m.coin():
        place(inputs, 14, m.operand((d,), "g"))
        place(inputs, 15, m.operand((d,), "g"))
    if m.coin(0.3):
        place(inputs, 16, m.operand((heads,)))
    attributes |= {"num_heads": heads, "kv_num_heads": kv, "selected_kv_source": source, **scaled(m)}
    m.node("DynamicSparseAttention", *inputs, outputs=3, domain=MICROSOFT, **attributes)
