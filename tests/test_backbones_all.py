"""attach_head on every architecture that timm lists, on the meta device; about half an hour on one core."""

from __future__ import annotations

import pytest
import torch

from mlhead.backbones import attach_head

timm = pytest.importorskip("timm", reason="timm is not installed")

C = 7


def problem(name: str) -> str | None:
    """What is wrong with one architecture, or None."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
        headed = attach_head(model, "ml_decoder", C, embed_dim=64, feedforward_dim=64)
        x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
        for training in (False, True):
            headed.train(training)
            features = headed.forward_features(x)
            width = features.shape[1 if features.ndim == 4 else 2]
            positions = features.shape[2] * features.shape[3] if features.ndim == 4 else features.shape[1]
            if width != headed.num_features or positions < 2:
                return f"features {tuple(features.shape)} of declared width {headed.num_features}"
            logits = headed.head(features)
            if logits.shape != (2, C):
                return f"logits {tuple(logits.shape)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # timm's own about deprecated names
def test_every_architecture_of_timm() -> None:
    """(2, C) logits in evaluation and training from each; all that fail are named at the end."""
    names = timm.list_models()
    assert len(names) > 1000
    failed = {}
    for i, name in enumerate(names):
        wrong = problem(name)
        if wrong is not None:
            failed[name] = wrong
            print(f"{name}: {wrong}", flush=True)
        if i % 100 == 99:
            print(f"{i + 1} of {len(names)}, {len(failed)} failed", flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} architectures", flush=True)
    assert not failed, "\n".join(f"{name}: {wrong}" for name, wrong in failed.items())
