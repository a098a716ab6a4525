"""`head(features, targets, update=optimizer)`: backward updates the classes' weight, whose gradient never exists."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from mlhead import SparseTargets, attach_head
from mlhead.heads import CSRAHead, GAPHead, Head, MLDecoder, TransformerDecoder, ZeroShotMLDecoder
from mlhead.losses import AsymmetricLoss, SoftmaxCrossEntropy
from mlhead.optim import ClassSGD

B, D, C = 4, 12, 7
SMALL = {"embed_dim": 16, "num_heads": 2, "feedforward_dim": 24, "dropout": 0.0}
MAKERS: dict[str, Callable[..., Head]] = {
    "gap": lambda **o: GAPHead(D, C, **o),
    "gap-plain": lambda **o: GAPHead(D, C, bias=False, **o),
    "ml_decoder": lambda **o: MLDecoder(D, C, groups=3, **SMALL, **o),
    "transformer_decoder": lambda **o: TransformerDecoder(D, C, **SMALL, **o),
}


def batch() -> tuple[Tensor, SparseTargets]:
    return torch.randn(B, D, 2, 3), SparseTargets.from_lists([[2, 5], [], [6], [0]], C)


@pytest.mark.parametrize("loss", [None, AsymmetricLoss(), SoftmaxCrossEntropy(reduction="sum")])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_it_trains_as_a_separate_optimizer(make: Callable[..., Head], loss: nn.Module | None) -> None:
    """Three steps end in the same parameters, and the weight never has a gradient.

    SGD, as AdamW makes steps of any sign of the keys' bias, whose gradient is 0 but for rounding.
    """
    head = make(loss=loss)
    twin = copy.deepcopy(head)
    weight = head.class_parameter
    assert weight is not None
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    fused = ClassSGD([weight], **options)
    optimizers = [fused, torch.optim.SGD(twin.parameters(), **options)]
    if rest := [p for p in head.parameters() if p is not weight]:
        optimizers.append(torch.optim.SGD(rest, **options))
    for _ in range(3):
        x, y = batch()
        if isinstance(loss, SoftmaxCrossEntropy):
            y = torch.tensor([2, 0, 6, 5])  # type: ignore[assignment]
        own, theirs = head(x, y, update=fused), twin(x, y)
        torch.testing.assert_close(own, theirs)
        own.backward()
        theirs.backward()
        assert weight.grad is None
        for optimizer in optimizers:
            optimizer.step()
        head.zero_grad()
        twin.zero_grad()
    for own, theirs in zip(head.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)


def test_a_model_hands_it_on() -> None:
    model = attach_head(timm.create_model("test_resnet"), "gap", C)
    weight = model.head.class_parameter
    before, optimizer = weight.detach().clone(), ClassSGD([weight], lr=0.1)
    model(torch.randn(B, 3, 32, 32), batch()[1], update=optimizer).backward()
    assert weight.grad is None
    assert not torch.equal(weight, before)
    assert all(p.grad is not None for p in model.parameters() if p is not weight)


def test_mistakes_are_named() -> None:
    x, y = batch()
    head = GAPHead(D, C)
    optimizer = ClassSGD([head.class_parameter])
    with pytest.raises(ValueError, match="GAPHead: update must be None without targets, got ClassSGD"):
        head(x, update=optimizer)
    must = r"update must be an optimizer of mlhead\.optim \(ClassSGD, ClassAdamW, ClassAdafactor\)"
    with pytest.raises(TypeError, match=f"{must}, got SGD"):
        head(x, y, update=torch.optim.SGD([head.class_parameter]))
    with pytest.raises(TypeError, match=f"{must}, got the class ClassSGD"):
        head(x, y, update=ClassSGD)
    with pytest.raises(ValueError, match="weight must be itself one of the parameters of `update`, got another tensor"):
        head(x, y, update=ClassSGD([nn.Parameter(torch.zeros(C, D))]))
    with pytest.raises(ValueError, match=r"after head\.reset\(\) or a copy, make the optimizer anew"):
        copy.deepcopy(head)(x, y, update=optimizer)
    for other in (CSRAHead(D, C), ZeroShotMLDecoder(D, C, word_vectors=torch.randn(C, 5), **SMALL)):
        assert other.class_parameter is None
        must = f"{type(other).__name__}: update must be None for a head without `class_parameter`, got ClassSGD"
        with pytest.raises(ValueError, match=must):
            other(x, y, update=optimizer)
