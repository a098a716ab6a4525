"""CSRA's inputs: features whose axes are all strided, odd numbers, and the best classes a range at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peak import printed_by

from mlhead import CSRAHead, csra_loss, csra_pool
from mlhead.heads import csra as csra_head
from mlhead.ops import _csra_plan

OPTIONS = {"temperatures": (1.0, math.inf), "lam": (0.2, 0.4)}

PEAK = """
import sys, torch
from mlhead._resident import peak
from mlhead import csra_loss, csra_pool
torch.set_num_threads(1)
B, step = int(sys.argv[1]), int(sys.argv[2])
w, options = torch.randn(2, 64, 512), dict(temperatures=(1.0, 2.0), lam=0.3)
x = torch.randn(64, 196, 512 * step)[..., ::step]
y = torch.zeros(64, 64)
for loss in (False, True):  # what is loaded at the first call
    small = x[:2].detach().requires_grad_()
    (csra_loss(small, w, None, y[:2], **options) if loss else csra_pool(small, w, **options).sum()).backward()
part = x[:B]
before = peak()
csra_pool(part, w, **options)
print(peak() - before)
"""


def test_strided_features_take_no_copy_of_all_of_them():
    few, many = (printed_by(PEAK, B, 2) for B in (16, 64))
    assert many - few < 12 << 20, "the features of 48 images more are 18 MiB, the scratch is 8"


@pytest.mark.parametrize("scratch", [None, 1 << 14])
@pytest.mark.parametrize("normalize", [False, True])
def test_strided_features_give_the_same(monkeypatch, scratch, normalize):
    if scratch is not None:
        small = _csra_plan.Machine(scratch, scratch, 0, 170e9, 25e9, 20e-6, 24)
        monkeypatch.setitem(_csra_plan.MACHINES, "cpu", small)
    torch.manual_seed(0)
    wide = torch.randn(7, 5, 22, dtype=torch.float64)
    forms = {
        "every second feature": wide[..., ::2],
        "every second position": wide[:, ::2, :11],
        "one image, expanded": wide[:1, :, :11].expand(7, 5, 11),
        "one position, expanded": wide[:, :1, :11].expand(7, 5, 11),
        "windows": torch.randn(100, dtype=torch.float64).as_strided((7, 5, 11), (8, 3, 1)),
    }
    weight = torch.randn(2, 9, 11, dtype=torch.float64)
    y = (torch.rand(7, 9) < 0.3).double()
    dout = torch.randn(7, 9, dtype=torch.float64)
    for name, x in forms.items():
        found = []
        for features in (x, x.contiguous()):
            leaf = features.detach().requires_grad_()
            w = weight.clone().requires_grad_()
            logits = csra_pool(leaf, w, normalize=normalize, **OPTIONS)
            loss = csra_loss(leaf, w, None, y, normalize=normalize, **OPTIONS)
            grads = torch.autograd.grad([logits, loss], [leaf, w], [dout, torch.tensor(3.0, dtype=torch.float64)])
            found.append((logits, loss, *grads))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_temperatures_have_an_end():
    x, w = torch.randn(2, 3, 4), torch.randn(1, 5, 4)
    for T in (1e30, 1e39, 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"temperatures must be above 0 and below 1e\+30, or math.inf"):
            csra_pool(x, w, temperatures=(T,), lam=0.1)
    hot = csra_pool(x, w, temperatures=(1e29,), lam=0.1)
    torch.testing.assert_close(hot, csra_pool(x, w, temperatures=(math.inf,), lam=0.1))
    for backend in ("reference", "auto"):
        scores = torch.tensor([[[1.0], [2.0], [3.0]]])
        one = torch.ones(1, 1, 1)
        assert csra_pool(scores, one, temperatures=(1e29,), lam=1.0, backend=backend).item() == 5


def test_lam_of_other_kinds():
    x, w = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    want = csra_pool(x, w, temperatures=(1.0, 2.0), lam=0.25)
    for lam in (torch.tensor(0.25), np.float32(0.25), torch.tensor([0.25, 0.25]), np.array([0.25, 0.25]), [0.25, 0.25]):
        assert torch.equal(csra_pool(x, w, temperatures=(1.0, 2.0), lam=lam), want)
    for wrong in (None, object()):
        with pytest.raises(TypeError, match=r"lam must be one number, or one per head \(H = 2\), got"):
            csra_pool(x, w, temperatures=(1.0, 2.0), lam=wrong)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("most", [1, 40, 1 << 22])
def test_the_best_classes_a_range_at_a_time(monkeypatch, heads, most):
    monkeypatch.setattr(csra_head, "TOPK_LOGITS", most)
    torch.manual_seed(0)
    head = CSRAHead(8, 37, num_heads=heads, bias=True).double()
    with torch.no_grad():
        head.weight[:, 20] = head.weight[:, 3]  # a tie
        head.bias.normal_()
        head.bias[:, 20] = head.bias[:, 3]
    x = torch.randn(5, 6, 8).double()
    logits = head(x)
    for k in (1, 4, 37):
        scores, classes = head.topk(x, k)
        want = torch.sort(logits, dim=1, descending=True, stable=True)
        torch.testing.assert_close(scores, want.values[:, :k])
        assert torch.equal(classes, want.indices[:, :k])
