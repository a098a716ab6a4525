"""Heads that others have changed: wrapped classifiers, norms of a weight, other parameters, dtypes, meta tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import mlhead
from mlhead import (
    CSRAHead,
    GAPHead,
    MLDecoder,
    SparseTargets,
    ZeroShotMLDecoder,
    attach_head,
    head_memory,
    load_public,
    public_state_dict,
    with_max_score,
)
from mlhead.losses import AsymmetricLoss, BinaryCrossEntropy, SoftmaxCrossEntropy

D, C = 8, 5


class Adapter(nn.Module):
    """A linear layer with a low rank beside it, which shows the layer's own weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low = base, nn.Parameter(torch.randn(C, 2))
        self.high = nn.Parameter(torch.randn(2, D))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.high.t() @ self.low.t()


def _scaled(head: GAPHead) -> None:
    head.fc.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


CHANGES = {
    "adapter": lambda head: setattr(head, "fc", Adapter(head.fc)),
    "spectral norm": lambda head: torch.nn.utils.spectral_norm(head.fc),
    "weight norm": lambda head: torch.nn.utils.weight_norm(head.fc),
    "pruning": lambda head: prune.random_unstructured(head.fc, "weight", 0.5),
    "a hook before": _scaled,
    "new spectral norm": lambda head: parametrizations.spectral_norm(head.fc),
    "new weight norm": lambda head: parametrizations.weight_norm(head.fc),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_changed_classifier_is_what_all_of_a_head_uses(kind: str, sparse: bool) -> None:
    torch.manual_seed(0)
    head = GAPHead(D, C, loss=AsymmetricLoss())
    CHANGES[kind](head)
    y = (torch.rand(4, C) < 0.4).float()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
    for step in range(3):
        x = torch.randn(4, 6, D)
        plain = copy.deepcopy(head) if "norm" not in kind and kind != "pruning" else None
        optimizer.zero_grad()
        loss = head(x, SparseTargets.from_dense(y) if sparse else y)
        loss.backward()
        if plain is not None:
            want = AsymmetricLoss()(plain(x), y)
            want.backward()
            torch.testing.assert_close(loss, want)
            for a, b in zip(head.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, msg=f"step {step}")
        assert all(p.grad is not None for p in head.parameters())
        optimizer.step()
    head.eval()
    x = torch.randn(3, 6, D)
    logits = head(x)
    torch.testing.assert_close(head(x, y[:3]), AsymmetricLoss()(logits, y[:3]))
    scores, classes = head.topk(x, 2)
    torch.testing.assert_close(scores, logits.topk(2).values)
    assert torch.equal(classes, logits.topk(2).indices)
    maps = head.attention_maps(x, [1, 3])
    per_position = torch.stack([head(x[:, i : i + 1]) for i in range(6)], 2) - head(torch.zeros(1, 1, D)).unsqueeze(2)
    chosen = per_position[:, [1, 3]].relu()
    torch.testing.assert_close(maps, chosen / chosen.sum(2, keepdim=True).clamp(min=1e-30))
    torch.testing.assert_close(head.attention_maps(x, torch.tensor([[1, 3]] * 3)), maps)


def test_an_adapter_has_no_weight_to_update() -> None:
    head = GAPHead(D, C)
    head.fc = Adapter(head.fc)
    optimizer = mlhead.optim.ClassSGD([head.class_parameter], lr=0.1)
    with pytest.raises(ValueError, match="update must be None for a classifier `fc` that is no plain nn"):
        head(torch.randn(2, 3, D), torch.zeros(2, C), update=optimizer)


@pytest.mark.filterwarnings("ignore")  # torch's own quantization is deprecated
def test_a_quantized_classifier_gives_logits_and_the_best() -> None:
    head = GAPHead(64, C).eval()
    quantized = pytest.importorskip("torch.ao.quantization").quantize_dynamic(copy.deepcopy(head), {nn.Linear})
    x = torch.randn(3, 4, 64)
    assert (quantized(x) - head(x)).abs().max() < 0.1
    assert torch.equal(quantized.topk(x, 2)[0], quantized(x).topk(2).values)


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("step", [1, 2, None])
def test_steps_of_queries_use_the_parameters_of_a_functional_call(groups: int | None, step: int | None) -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 8, "num_heads": 2, "feedforward_dim": 16, "dropout": 0.0, "word_dim": 6}
    head = ZeroShotMLDecoder(D, 7, groups=groups, query_step=step, **small).double()
    whole = ZeroShotMLDecoder(D, 7, groups=groups, **small).double()
    words, x, y = torch.randn(7, 6).double(), torch.randn(2, 4, D).double(), torch.ones(2, 7).double()
    given = {name: torch.randn_like(p).requires_grad_() for name, p in head.named_parameters()}
    found = []
    for module in (head, whole):
        loss = functional_call(module, given, (x, y), {"word_vectors": words})
        found.append(torch.autograd.grad(loss, list(given.values())))
    for name, a, b in zip(given, *found, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_compiled_models_are_refused() -> None:
    timm = pytest.importorskip("timm")
    model = torch.compile(timm.create_model("test_resnet"))
    for call in (lambda: attach_head(model, "gap", 3), lambda: with_max_score(model)):
        with pytest.raises(TypeError, match=r"model must be an uncompiled model.*torch.compile what comes out"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banks_take_the_dtype_and_device_that_are_assigned(dtype: torch.dtype) -> None:
    small = {"embed_dim": 8, "num_heads": 2, "feedforward_dim": 16, "word_vectors": torch.randn(C, 6)}
    state = ZeroShotMLDecoder(D, C, **small).to(dtype).eval().state_dict()
    with torch.device("meta"):
        head = ZeroShotMLDecoder(D, C, **{**small, "word_vectors": torch.zeros(C, 6)}).eval()
    head.load_state_dict(state, assign=True)
    assert (head.bank().dtype, head.bank().device.type) == (dtype, "cpu")
    assert head(torch.randn(2, 4, D, dtype=dtype)).shape == (2, C)


class Sharded:
    """Stands for the devices that share a head's classes."""


def test_public_forms_are_of_whole_heads() -> None:
    for head in (MLDecoder(D, C, groups=2, embed_dim=8, num_heads=2), CSRAHead(D, C)):
        state = public_state_dict(head)
        head._shards = Sharded()
        with pytest.raises(RuntimeError, match="public_state_dict must be called before parallelize_head"):
            public_state_dict(head)
        with pytest.raises(RuntimeError, match="load_public must be called before parallelize_head"):
            load_public(head, state)


@pytest.mark.parametrize("kind", [BinaryCrossEntropy, AsymmetricLoss, SoftmaxCrossEntropy])
def test_weights_of_a_loss_keep_their_numbers(kind: type[nn.Module]) -> None:
    weight = torch.tensor([1e5, 1003.7, 1.0, 2.0, 3.0])
    head = GAPHead(D, C, loss=kind(class_weight=weight))
    weight.mul_(0)
    want = torch.tensor([1e5, 1003.7, 1.0, 2.0, 3.0])
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, copy.deepcopy, nn.Module.cpu):
        head = change(head)
        assert torch.equal(head.loss.class_weight, want)
    meta = GAPHead(D, C, device="meta", loss=kind(class_weight=want))
    assert torch.equal(meta.to_empty(device="cpu").loss.class_weight, want)


def test_memory_of_fp64_states() -> None:
    options = {"groups": 10, "optimizer": "adamw", "fused_update": True}
    single, double = (head_memory(1000, 64, 4, dtype=d, **options) for d in (torch.float32, torch.float64))
    assert double.optimizer == 2 * single.optimizer == 2 * 8 * (10 * 64 * 100 + 1000)
