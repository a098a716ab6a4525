"""What `tests/test_parallel.py` runs in several processes: a head over a class group against the whole head.

python tests/parallel_checks.py RESULTS RANK WORLD STORE     every check; writes {name: "" or what went wrong}
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mlhead import CSRAHead, GAPHead, MLDecoder, SparseTargets, TransformerDecoder, ZeroShotMLDecoder, losses
from mlhead.optim import ClassSGD
from mlhead.parallel import class_parameters, clip_grad_norm_, parallelize_head

D, L, E = 12, 5, 8
DECODER = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 16, "dropout": 0.0}
PER_DEVICE = 2  # images


def _zero_shot(C: int, groups: int | None) -> ZeroShotMLDecoder:
    random = torch.Generator().manual_seed(5)
    vectors = torch.randn(C, 6, generator=random, dtype=torch.float64)
    return ZeroShotMLDecoder(D, C, word_vectors=vectors, groups=groups, **DECODER)


# Class counts that no number of devices divides, that leave a device without any, and groups without a class.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "gap": lambda: GAPHead(D, 10),
    "gap, no bias, 2 classes": lambda: GAPHead(D, 2, bias=False),
    "csra": lambda: CSRAHead(D, 10, num_heads=2, lam=0.3, bias=True),
    "csra, 2 classes": lambda: CSRAHead(D, 2),
    "ml_decoder": lambda: MLDecoder(D, 10, groups=4, **DECODER),
    "ml_decoder, 14 classes in 5 groups": lambda: MLDecoder(D, 14, groups=5, **DECODER),
    "ml_decoder, empty groups": lambda: MLDecoder(D, 6, groups=5, **DECODER),
    "transformer_decoder": lambda: TransformerDecoder(D, 7, **DECODER),
    "zero_shot": lambda: _zero_shot(7, None),
    "zero_shot, groups": lambda: _zero_shot(15, 8),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "bce": losses.BinaryCrossEntropy,
    "asl": lambda: losses.AsymmetricLoss(reduction="sum"),
    "softmax": lambda: losses.SoftmaxCrossEntropy(label_smoothing=0.1),
}
OWN = {"same images": False, "own images": True}


def _close(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


class Setup:
    """A head, whole and sharded, with data for all devices and for this one."""

    def __init__(self, kind: str, own: bool, mesh: Any = None) -> None:
        torch.manual_seed(0)
        self.world, self.rank, self.own = dist.get_world_size(), dist.get_rank(), own
        self.mesh = init_device_mesh("cpu", (self.world,)) if mesh is None else mesh
        self.whole = HEADS[kind]().double()
        self.sharded = copy.deepcopy(self.whole)
        self.C = self.whole.num_classes
        parallelize_head(self.sharded, self.mesh, input_layouts=Shard(0) if own else Replicate())
        group = self.mesh.size(self.mesh.ndim - 1)
        self.N, place = group, self.rank % group
        B = group * PER_DEVICE if own else PER_DEVICE
        self.rows = slice(place * PER_DEVICE, (place + 1) * PER_DEVICE) if own else slice(0, B)
        self.features = torch.randn(B, L, D, dtype=torch.float64)
        self.y = torch.rand(B, self.C) < 0.4
        self.y[:, 0] |= ~self.y.any(1)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Features of all images, and of this device's, as leaves."""
        return self.features.clone().requires_grad_(), self.features[self.rows].clone().requires_grad_()

    def compare_gradients(self, x: Tensor, x_own: Tensor) -> None:
        """Of features and all parameters."""
        assert x.grad is not None
        assert x_own.grad is not None
        factor = self.N if self.own else 1
        _close("gradient of the features", x_own.grad, x.grad[self.rows] * factor)
        wanted = dict(self.whole.named_parameters())
        for name, parameter in self.sharded.named_parameters():
            want, got = wanted[name].grad, parameter.grad
            if want is None:
                assert got is None, name
                continue
            assert got is not None, name
            if isinstance(got, DTensor):
                got = got.full_tensor()
                if got.shape != want.shape:  # a decoder's bias, in the form of its groups
                    rest = got.flatten()[want.numel() :]
                    assert not rest.any(), name
                    got = got.flatten()[: want.numel()]
            elif self.own:  # as DDP would
                got = got.clone()
                dist.all_reduce(got)
                got /= self.world
            _close(f"gradient of {name}", got, want)


def check_loss(kind: str, loss: str, own: bool, form: str) -> None:
    """The loss in the head and all gradients."""
    s = Setup(kind, own)
    options: dict[str, Any] = {}
    options_own: dict[str, Any] = {}
    for head in (s.whole, s.sharded):
        head.loss = LOSSES[loss]()
    targets, targets_own = s.y, s.y[s.rows]
    if form == "sparse":
        unknown = (torch.rand(s.y.shape) < 0.3) & ~s.y
        targets, targets_own = (SparseTargets.from_dense(t) for t in (targets, targets_own))
        if loss != "softmax":
            options["ignore"], options_own["ignore"] = (SparseTargets.from_dense(t) for t in (unknown, unknown[s.rows]))
        weight = 0.5 + torch.rand(len(s.y), dtype=torch.float64)
        options["sample_weight"], options_own["sample_weight"] = weight, weight[s.rows]
    elif form == "indices":
        targets, targets_own = s.y.int().argmax(1), s.y[s.rows].int().argmax(1)
    x, x_own = s.inputs()
    want = s.whole(x, targets, **options)
    got = s.sharded(x_own, targets_own, **options_own)
    _close("loss", got, want)
    with torch.no_grad():
        _close("loss without gradients", s.sharded(x_own, targets_own, **options_own), want)
    (want * 1.5).backward()
    (got * 1.5).backward()
    s.compare_gradients(x, x_own)


def check_logits(kind: str, own: bool) -> None:
    """Logits, a loss on them, and the best classes."""
    s = Setup(kind, own)
    x, x_own = s.inputs()
    want, got = s.whole(x), s.sharded(x_own)
    _close("logits", got, want[s.rows])
    losses.binary_cross_entropy(want, s.y).backward()
    losses.binary_cross_entropy(got, s.y[s.rows]).backward()
    s.compare_gradients(x, x_own)
    for k in (1, min(3, s.C), s.C):
        for wanted, found in zip(s.whole.topk(x, k), s.sharded.topk(x_own, k), strict=True):
            _close(f"topk {k}", found, wanted[s.rows])


def check_training(kind: str) -> None:
    """Steps of AdamW with gradients clipped by their norm over all parameters end in the same weights."""
    s = Setup(kind, False)
    torch.manual_seed(1)
    trunks = [nn.Linear(D, D).double() for _ in range(2)]
    trunks[1].load_state_dict(trunks[0].state_dict())
    optimizers, norms = [], []
    for head, trunk in zip((s.whole, s.sharded), trunks, strict=True):
        parameters = [*trunk.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        for _ in range(3):
            head(trunk(s.features), s.y).backward()
            norm = clip_grad_norm_(parameters, 0.05)
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
        norms.append(norm)
    _close("norm", norms[1], norms[0])
    assert norms[0] > 0.05
    _close("trunk", trunks[1].weight, trunks[0].weight)
    wanted = dict(s.whole.named_parameters())
    for name, parameter in s.sharded.named_parameters():
        got = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        want = wanted[name]
        _close(name, got.flatten()[: want.numel()], want.flatten())


def check_parameters(kind: str) -> None:
    """What is sharded is what belongs to classes."""
    s = Setup(kind, True)
    found = class_parameters(nn.Sequential(nn.Identity(), s.sharded))
    for name, parameter in found.items():
        assert name.startswith("1."), name
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() < parameter.numel() or s.world == 1, name
    assert len(found) == (
        0 if kind.startswith("zero_shot") else 1 if "no bias" in kind or kind == "csra, 2 classes" else 2
    )


def check_mesh_of_two_axes(kind: str) -> None:
    """Data-parallel over the first axis: gradients of the classes are the mean over it."""
    world = dist.get_world_size()
    if world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    s = Setup(kind, True, mesh)
    replica = dist.get_rank() // 2
    features, y = torch.cat([s.features, s.features.flip(0) * 0.5]), torch.cat([s.y, s.y.flip(1)])
    mine = slice(replica * len(s.y), (replica + 1) * len(s.y))
    x = features.clone().requires_grad_()
    s.whole(x, y).backward()
    x_own = features[mine][s.rows].clone().requires_grad_()
    s.sharded(x_own, y[mine][s.rows]).backward()
    wanted = dict(s.whole.named_parameters())
    for name, parameter in s.sharded.named_parameters():
        want, got = wanted[name].grad, parameter.grad
        if want is None:
            continue
        assert got is not None
        if isinstance(got, DTensor):
            got = got.full_tensor().flatten()[: want.numel()].view(want.shape)
        else:
            dist.all_reduce(got)
            got = got / world
        _close(f"gradient of {name}", got, want)


def check_maps(kind: str) -> None:
    """Attention maps of chosen classes."""
    s = Setup(kind, False)
    chosen = torch.tensor([s.C - 1, 0, 0])
    _close("maps", s.sharded.attention_maps(s.features, chosen), s.whole.attention_maps(s.features, chosen))


def check_channels_last(own: bool) -> None:
    """Maps in channels-last order, forward and backward."""
    s = Setup("csra", own)
    s.features = torch.randn(len(s.y), D, D, D, dtype=torch.float64)
    x, x_own = (t.detach().to(memory_format=torch.channels_last).requires_grad_() for t in s.inputs())
    _close("loss", s.sharded(x_own, s.y[s.rows]), s.whole(x, s.y))
    s.whole(x, s.y).backward()
    s.sharded(x_own, s.y[s.rows]).backward()
    s.compare_gradients(x, x_own)


def check_banks() -> None:
    """The state dict of a sharded head has whole banks, which a whole head loads, and the reverse."""
    s = Setup("zero_shot, groups", False)
    state = s.sharded.state_dict()
    _close("bank", state["banks.train"], s.whole.bank("train"))
    other = torch.randn(20, 6, dtype=torch.float64)
    s.whole.set_bank("more", other)
    s.sharded.load_state_dict(s.whole.state_dict())
    for head in (s.whole, s.sharded):
        head.use("more")
    _close("logits", s.sharded(s.features), s.whole(s.features))
    vectors = torch.randn(15, 6, dtype=torch.float64)
    given = (head(s.features, word_vectors=vectors) for head in (s.sharded, s.whole))
    _close("logits of given vectors", *given)
    # A device has memory for its own rows, none of it the caller's.
    s.sharded.set_bank("train", vectors)
    for name in ("train", "more"):
        rows = s.sharded.banks.rows(name)
        assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size(), name
    vectors.zero_()
    assert s.sharded.bank("train").abs().min() > 0


def check_copy(kind: str) -> None:
    """A deep copy, as of a moving average, lies where the head does and gets the same gradients."""
    s = Setup(kind, True)
    s.sharded = copy.deepcopy(s.sharded)
    x, x_own = s.inputs()
    s.whole(x, s.y).backward()
    s.sharded(x_own, s.y[s.rows]).backward()
    s.compare_gradients(x, x_own)


def check_given_vectors() -> None:
    """Word vectors that are learned get the gradient of all devices; frozen parameters get none."""
    s = Setup("zero_shot, groups", False)
    vectors = torch.randn(15, 6, dtype=torch.float64)
    grads = []
    for head in (s.whole, s.sharded):
        head.requires_grad_(False)
        own = vectors.clone().requires_grad_()
        head(s.features, s.y, word_vectors=own).backward()
        assert own.grad is not None
        grads.append(own.grad)
    _close("gradient of the vectors", grads[1], grads[0])


def check_steps() -> None:
    """Queries decoded a few at a time, and again in backward."""
    s = Setup("zero_shot", True)
    s.sharded.query_step = 1
    x, x_own = s.inputs()
    s.whole(x, s.y).backward()
    s.sharded(x_own, s.y[s.rows]).backward()
    s.compare_gradients(x, x_own)


def check_half_precision() -> None:
    """Autocast, also where a device has no class; small factors do not underflow in the dtype of the weights."""
    head = parallelize_head(GAPHead(D, 2), init_device_mesh("cpu", (dist.get_world_size(),)))
    features = torch.randn(3, L, D, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        scores, classes = head.topk(features, 2)
    assert scores.dtype == torch.bfloat16
    assert sorted(classes[0].tolist()) == [0, 1]
    s = Setup("gap", False)
    weight = torch.full((len(s.y),), 2.0**-20, dtype=torch.float16)
    _close("loss", s.sharded(s.features, s.y, sample_weight=weight), s.whole(s.features, s.y, sample_weight=weight))


def check_sharded_again() -> None:
    """Which parameters are a head's own shards stays known when FSDP has made DTensors of all."""
    s = Setup("ml_decoder", True)
    before = set(class_parameters(s.sharded))
    for owner in list(s.sharded.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                whole = distribute_tensor(parameter.detach(), s.mesh, [Replicate()])
                setattr(owner, name, nn.Parameter(whole))
    assert set(class_parameters(s.sharded)) == before


def check_meta() -> None:
    """A head that never existed whole: from the meta device, with values drawn where they lie."""
    with torch.device("meta"):
        head = MLDecoder(D, 10, groups=4, **DECODER)
    parallelize_head(head, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert head.duplicate_pooling.is_meta
    head.to_empty(device="cpu")
    for parameter in head.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    assert head(torch.ones(2, L, D)).shape == (2, 10)
    options: dict[type[nn.Module], dict[str, Any]] = {GAPHead: {}, CSRAHead: {"bias": True}, MLDecoder: DECODER}
    for kind, own in options.items():
        with torch.device("meta"):
            head = kind(D, 10, prior=0.02, **own)
        parallelize_head(head, init_device_mesh("cpu", (dist.get_world_size(),))).to_empty(device="cpu")
        head.reset_parameters()
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                if name in ("fc.weight", "weight", "duplicate_pooling"):
                    parameter.zero_()
        torch.testing.assert_close(head(torch.ones(2, L, D)).sigmoid(), torch.full((2, 10), 0.02))


def check_errors() -> None:
    """Wrong use is named on every device."""
    x = torch.ones(1, L, D)
    head, weight, mesh = GAPHead(D, 10), torch.zeros(10, D), init_device_mesh("cpu", (dist.get_world_size(),))
    own = parallelize_head(GAPHead(D, 10), mesh, input_layouts=Shard(0))
    unknown = SparseTargets.from_lists([[1]], 10)
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: parallelize_head(nn.Linear(2, 2), mesh), TypeError, "head must be"),
        (lambda: parallelize_head(head, "cpu"), TypeError, "mesh must be"),
        (lambda: parallelize_head(head, mesh, input_layouts=Shard(1)), TypeError, "input_layouts must be"),
        (lambda: parallelize_head(_zero_shot(1, None), mesh), ValueError, "word_vectors must be"),
        (lambda: parallelize_head(parallelize_head(head, mesh), mesh), ValueError, "not sharded yet"),
        (lambda: head.reset(5), RuntimeError, "before parallelize_head"),
        (lambda: head.set_prior(0.1), RuntimeError, "before parallelize_head"),
        (lambda: own(x[: dist.get_rank()]), ValueError, "features must be of as many images"),
        (lambda: head(x, torch.ones(1, 9)), ValueError, "targets must be"),
        (lambda: head(x, torch.ones(2, 10)), ValueError, "targets must be of B = 1 rows"),
        (lambda: head(x, torch.ones(1, 10), sample_weight=torch.ones(2)), ValueError, "sample_weight must be"),
        (lambda: head(x, torch.ones(1, 10), ignore=unknown), TypeError, r"ignore must be a bool .*got SparseTargets"),
        (lambda: head(x, torch.ones(1, 10), ignore=torch.ones(1, 9) > 0), ValueError, "ignore must be"),
        (lambda: head(x, [1]), TypeError, "targets must be a tensor"),
        (lambda: head.topk(x, 11), ValueError, "k must be"),
        (
            lambda: head(x, unknown, update=ClassSGD([weight], lr=0.1)),
            ValueError,
            "update must be None for a sharded head",
        ),
    ]
    for call, error, text in wrong:
        with pytest.raises(error, match=text):
            call()
    assert head.attention_maps(x, []).shape == (1, 0, L)


def checks() -> dict[str, Callable[[], None]]:
    """Every check by its name."""
    found: dict[str, Callable[[], None]] = {
        "errors": check_errors,
        "banks": check_banks,
        "meta": check_meta,
        "vectors": check_given_vectors,
        "steps": check_steps,
        "half precision": check_half_precision,
        "sharded again": check_sharded_again,
    }
    for kind in HEADS:
        for which, own in OWN.items():
            found[f"logits, {kind}, {which}"] = lambda k=kind, o=own: check_logits(k, o)
            for loss, form in (("bce", "dense"), ("asl", "sparse"), ("softmax", "indices")):
                found[f"{loss}, {kind}, {which}"] = lambda k=kind, i=loss, o=own, f=form: check_loss(k, i, o, f)
        found[f"parameters, {kind}"] = lambda k=kind: check_parameters(k)
    for which, own in OWN.items():
        found[f"softmax of sparse targets, {which}"] = lambda o=own: check_loss("gap", "softmax", o, "sparse")
        found[f"channels-last, {which}"] = lambda o=own: check_channels_last(o)
    for kind in ("gap", "csra", "ml_decoder", "zero_shot"):
        found[f"training, {kind}"] = lambda k=kind: check_training(k)
        found[f"two axes, {kind}"] = lambda k=kind: check_mesh_of_two_axes(k)
    for kind in ("gap", "zero_shot"):
        found[f"copy, {kind}"] = lambda k=kind: check_copy(k)
    for kind in ("gap", "csra", "ml_decoder"):
        found[f"maps, {kind}"] = lambda k=kind: check_maps(k)
    return found


def main() -> None:
    """One process of the group."""
    results, rank, world, store = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    outcome = {}
    for name, check in checks().items():
        try:
            check()
            outcome[name] = ""
        except Exception as error:
            outcome[name] = traceback.format_exc()
            if "imed out" in str(error) or "Connection closed" in str(error):
                break  # the others wait, or have gone: nothing that follows would mean anything
    results.write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
