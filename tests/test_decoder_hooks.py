"""What users put on the modules of the decoder layer acts: hooks, parametrizations, modules in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlhead.heads import Head, MLDecoder, TransformerDecoder

D, C, E = 12, 7, 16
SMALL: dict[str, Any] = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 24}
HEADS: dict[str, Callable[..., Head]] = {
    "ml_decoder": lambda **options: MLDecoder(D, C, groups=3, queries="learnable", **SMALL, **options),
    "transformer_decoder": lambda **options: TransformerDecoder(D, C, **SMALL, **options),
}
PARTS = ["norm1", "norm2", "norm3", "linear1", "linear2", "multihead_attn", "multihead_attn.out_proj"]
ALL_PARTS = [
    *(("ml_decoder", part) for part in PARTS),
    *(("transformer_decoder", part) for part in ("norm1", "self_attn", "self_attn.out_proj")),
]
HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "full_backward": nn.Module.register_full_backward_hook,
    "full_backward_pre": nn.Module.register_full_backward_pre_hook,
}


def make(name: str, dropout: float = 0.0) -> Head:
    torch.manual_seed(3)
    head = HEADS[name](dropout=dropout, dtype=torch.float64)
    for key, parameter in head.named_parameters():
        if key.startswith("layers"):  # biases and the norms' weights too
            nn.init.normal_(parameter, 0.5, 0.2)
    return head


def step(head: Head) -> list[Tensor]:
    """Logits and all gradients of a call with the same input, and the same masks."""
    torch.manual_seed(5)
    x = torch.randn(3, 6, D, dtype=torch.float64, requires_grad=True)
    logits = head(x)
    inputs = [x, *(p for p in head.parameters() if p.requires_grad)]
    return [logits, *torch.autograd.grad(logits, inputs, torch.randn_like(logits))]


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("name", "part"), ALL_PARTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hooks_fire_and_change_nothing(name: str, part: str, kind: str, dropout: float) -> None:
    """Once for each call; a hook that only looks leaves outputs and gradients as they are, dropout's masks too."""
    head = make(name, dropout)
    want = step(head)
    calls: list[nn.Module] = []
    module = head.layers[0].get_submodule(part)
    handle = HOOKS[kind](module, lambda hooked, *_: calls.append(hooked))
    got = step(head)
    assert calls == [module]
    torch.testing.assert_close(got, want)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(step(head), want, strict=True))
    assert calls == [module]


@pytest.mark.parametrize(("name", "part"), ALL_PARTS)
def test_what_a_hook_returns_is_used(name: str, part: str) -> None:
    head = make(name).eval()
    before = step(head)[0]
    head.layers[0].get_submodule(part).register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert (step(head)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["norm1", "norm2", "norm3", "multihead_attn.out_proj"])
def test_modules_in_their_place_are_called(part: str) -> None:
    """A parametrized one, another class, and a forward that was put on the instance."""
    head = make("ml_decoder").eval()
    layer = head.layers[0]
    module = layer.get_submodule(part)
    before = step(head)[0]

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module, "weight", Double())
    doubled = step(head)[0]
    assert (doubled - before).abs().max() > 1e-3
    parametrize.remove_parametrizations(module, "weight")  # leaves the doubled weight
    torch.testing.assert_close(step(head)[0], doubled)

    class Negated(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return -self.inner(x)

    layer.set_submodule(part, Negated(module))
    negated = step(head)[0]
    assert (negated - doubled).abs().max() > 1e-3
    layer.set_submodule(part, module)
    plain = module.forward
    module.forward = lambda x: -plain(x)
    torch.testing.assert_close(step(head)[0], negated)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hooks_in_16_bits(dropout: float) -> None:
    """The dtype of the logits and of the memory between is that without hooks, under autocast too."""
    head, low = make("ml_decoder", dropout).float(), make("ml_decoder", dropout).to(torch.bfloat16)
    x = torch.randn(3, 6, D)
    for norm in ("norm1", "norm2", "norm3"):
        for hooked in (head, low):
            hooked.layers[0].get_submodule(norm).register_forward_hook(lambda *_: None)
    assert low(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(x)
        assert head(x, pre_logits=True).dtype == torch.bfloat16
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_hooks_under_compile() -> None:
    """Still one graph, in which the hook's arithmetic is."""
    torch._dynamo.reset()
    head = make("ml_decoder").eval()
    head.layers[0].norm2.register_forward_hook(lambda module, inputs, output: output + 1.0)
    x = torch.randn(2, 6, D, dtype=torch.float64)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))
