"""The oracle itself: every reference against the formulas of the papers, written out as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlhead import csra_attention, csra_pool, group_fc, query_attention, query_attention_weights
from mlhead.reference._dropout import keep_mask

F64 = torch.float64


@pytest.mark.parametrize(
    ("B", "G", "E", "C"), [(2, 3, 4, 7), (3, 4, 5, 16), (2, 20, 3, 21), (1, 5, 2, 5), (2, 1, 3, 6)]
)
def test_group_fc_is_equation_3(B: int, G: int, E: int, C: int) -> None:
    J = math.ceil(C / G)
    h, weight, bias = torch.randn(B, G, E, dtype=F64), torch.randn(G, E, J, dtype=F64), torch.randn(C, dtype=F64)
    logits = group_fc(h, weight, bias, backend="reference")
    for b in range(B):
        for c in range(C):
            k, j = divmod(c, J)
            expected = sum(h[b, k, e] * weight[k, e, j] for e in range(E)) + bias[c]
            torch.testing.assert_close(logits[b, c], expected)


def test_group_fc_is_the_pseudo_code_of_appendix_l() -> None:
    B, G, E, C = 3, 5, 7, 18
    h, weight = torch.randn(B, G, E, dtype=F64), torch.randn(G, E, 4, dtype=F64)
    output = torch.zeros(B, G, 4, dtype=F64)
    for i in range(G):
        output[:, i, :] = torch.matmul(h[:, i, :], weight[i])
    torch.testing.assert_close(group_fc(h, weight, num_classes=C), output.flatten(1)[:, :C])


def test_group_fc_shared_weight_is_one_linear_layer() -> None:
    h, weight, bias = torch.randn(3, 5, 7, dtype=F64), torch.randn(7, 1, dtype=F64), torch.randn(1, dtype=F64)
    logits = group_fc(h, weight, bias)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits, torch.nn.functional.linear(h, weight.T, bias).squeeze(-1))
    order = torch.randperm(5)
    torch.testing.assert_close(group_fc(h[:, order], weight, bias), logits[:, order])


def test_group_fc_has_no_gradient_where_there_is_no_class() -> None:
    h = torch.randn(2, 2000, 3, requires_grad=True)
    weight = torch.randn(2000, 3, 2, requires_grad=True)
    weight.data[-1] = math.inf
    group_fc(h, weight, num_classes=2001).sum().backward()
    assert weight.grad is not None
    assert h.grad is not None
    assert bool((weight.grad.view(2000, 3, 2)[1001:] == 0).all())
    assert bool((weight.grad[1000, :, 1] == 0).all())
    assert bool((h.grad[:, 1001:] == 0).all())
    assert bool((weight.grad[:1000] != 0).any())


def _csra_by_loops(x: Tensor, w: Tensor, T: tuple[float, ...], lam: tuple[float, ...]) -> Tensor:
    B, L, _ = x.shape
    H, C, _ = w.shape
    logits = torch.zeros(B, C, dtype=F64)
    for b in range(B):
        for c in range(C):
            for h in range(H):
                s = [torch.dot(x[b, position], w[h, c]) for position in range(L)]
                if T[h] == math.inf:
                    pooled = max(s)
                else:
                    total = sum(torch.exp(T[h] * v) for v in s)
                    pooled = sum(torch.exp(T[h] * v) / total * v for v in s)
                logits[b, c] += sum(s) / L + lam[h] * pooled
    return logits


def test_csra_is_equation_8() -> None:
    x, w = torch.randn(2, 6, 5, dtype=F64), torch.randn(3, 4, 5, dtype=F64)
    T, lam = (0.7, 3.0, math.inf), (0.1, 0.2, 0.3)
    expected = _csra_by_loops(x, w, T, lam)
    torch.testing.assert_close(csra_pool(x, w, temperatures=T, lam=lam), expected)
    as_map = x.transpose(1, 2).reshape(2, 5, 2, 3)
    torch.testing.assert_close(csra_pool(as_map, w, temperatures=T, lam=lam), expected)
    channels_last = as_map.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(csra_pool(channels_last, w, temperatures=T, lam=lam), expected)
    normalized = w / w.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(
        csra_pool(x, w, temperatures=T, lam=lam, normalize=True), _csra_by_loops(x, normalized, T, lam)
    )


def test_csra_figure_1_is_a_linear_classifier_plus_max_pooling() -> None:
    x = torch.randn(2, 9, 5, dtype=F64)
    fc = torch.nn.Linear(5, 4, dtype=F64)
    scores = fc(x)
    got = csra_pool(x, fc.weight[None], fc.bias[None], temperatures=(math.inf,), lam=0.2)
    torch.testing.assert_close(got, scores.mean(1) + 0.2 * scores.amax(1))


def test_csra_edges() -> None:
    x, w = torch.randn(2, 3, 5, dtype=F64), torch.randn(1, 4, 5, dtype=F64)
    w[0, 2] = 0
    w.requires_grad_()
    logits = csra_pool(x, w, temperatures=(1.0,), lam=0.3, normalize=True)
    logits.sum().backward()
    assert bool((logits[:, 2] == 0).all())
    assert w.grad is not None
    assert bool(w.grad.isfinite().all())
    # The maximum's gradient goes to the first of equal positions.
    x = torch.ones(1, 4, 1, dtype=F64, requires_grad=True)
    csra_pool(x, torch.ones(1, 1, 1, dtype=F64), temperatures=(math.inf,), lam=1.0).sum().backward()
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([1.25, 0.25, 0.25, 0.25], dtype=F64))


def test_csra_attention_of_chosen_classes() -> None:
    x, w = torch.randn(2, 6, 5, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
    maps = csra_attention(x, w, [3, 1], temperatures=(2.0, math.inf))
    assert maps.shape == (2, 2, 2, 6)
    torch.testing.assert_close(maps[:, 0, 0], torch.softmax(2.0 * x @ w[0, 3], -1))
    assert torch.equal(maps[:, 1, 1].argmax(-1), (x @ w[1, 1]).argmax(-1))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, dtype=F64))


@pytest.mark.parametrize("per_image", [False, True])
def test_query_attention_is_equation_1(per_image: bool) -> None:
    B, L, G, E, H = 2, 5, 3, 8, 2
    q = torch.randn(*([B] if per_image else []), G, E, dtype=F64)
    k, v = torch.randn(B, L, E, dtype=F64), torch.randn(B, L, E, dtype=F64)
    out = query_attention(q, k, v, H)
    maps = query_attention_weights(q, k, H)
    for b in range(B):
        for g in range(G):
            query = q[b, g] if per_image else q[g]
            average = torch.zeros(L, dtype=F64)
            for head in range(H):
                part = slice(head * E // H, (head + 1) * E // H)
                scores = torch.stack([torch.dot(query[part], k[b, i, part]) for i in range(L)]) / math.sqrt(E / H)
                p = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(out[b, g, part], sum(p[i] * v[b, i, part] for i in range(L)))
                average += p / H
            torch.testing.assert_close(maps[b, g], average)


def test_query_attention_agrees_with_torch() -> None:
    q, k, v = (torch.randn(2, n, 96, dtype=F64) for n in (7, 9, 9))
    mask = torch.rand(2, 9) > 0.3
    heads = [t.unflatten(-1, (4, 24)).transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(query_attention(q, k, v, 4, key_mask=mask), expected.transpose(1, 2).flatten(-2))


def test_dropout_mask_is_a_function_of_seed_and_position() -> None:
    seed = torch.tensor(2**40 + 17)
    mask = keep_mask(seed, 0.3, 8, 4, 50, 49)
    assert torch.equal(mask, keep_mask(seed, 0.3, 8, 4, 50, 49))
    assert torch.equal(mask[:3], keep_mask(seed, 0.3, 3, 4, 50, 49))
    others = [keep_mask(torch.tensor(s), 0.3, 8, 4, 50, 49) for s in (17, 2**40 + 18, 2**41 + 17)]
    for other in (*others, mask.roll(1, 0), mask.roll(1, 1), mask.roll(1, 2), mask.roll(1, 3)):
        # Independent masks agree with probability 0.7^2 + 0.3^2; 78,400 draws stay within 5 standard deviations.
        assert (mask == other).double().mean().item() == pytest.approx(0.58, abs=0.009)
    assert mask.double().mean().item() == pytest.approx(0.7, abs=0.0082)
    assert bool(keep_mask(seed, 0.0, 1, 1, 100, 100).all())


def test_dropout_mask_is_the_documented_hash() -> None:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    seed, p, B, H, G, L = 2**35 + 99, 0.4, 2, 2, 3, 5
    mask = keep_mask(torch.tensor(seed), p, B, H, G, L)
    for b in range(B):
        key0 = mix((mix((seed + b) % 2**32) + (seed >> 32)) % 2**32)
        key1 = mix((key0 + 1) % 2**32)
        for i in range(H * G * L):
            u = (i + key0) % 2**32
            u = ((u ^ (u >> 16)) * 0x7FEB352D) % 2**32 ^ key1
            u = ((u ^ (u >> 15)) * 0x846CA68B) % 2**32
            assert bool(mask[b].view(-1)[i]) == ((u ^ (u >> 16)) >= int(p * 2**32))


def test_attention_dropout_keeps_the_mean_and_repeats() -> None:
    q, k, v = torch.randn(3, 8), torch.randn(400, 6, 8), torch.ones(400, 6, 8)
    out = query_attention(q, k, v, 2, dropout_p=0.25, seed=3)
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(out, query_attention(q, k, v, 2, dropout_p=0.25, seed=torch.tensor(3)))
    torch.manual_seed(5)
    first = query_attention(q, k, v, 2, dropout_p=0.25)
    assert not torch.equal(first, query_attention(q, k, v, 2, dropout_p=0.25))
    torch.manual_seed(5)
    assert torch.equal(first, query_attention(q, k, v, 2, dropout_p=0.25))
