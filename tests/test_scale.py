"""What class-parallel heads send and keep: the formulas against counts and measurement, and docs/scale.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from benchmarks import records, scale
from mlhead import GAPHead, MLDecoder, _backend, head_memory
from mlhead._resident import peak
from mlhead.parallel import Move, step_traffic

LAYOUTS = ("same images", "own images")
DIMS = {"B": 3, "L": 5, "D": 12, "C": 15, "E": 8}
HEADS: dict[str, dict[str, int]] = {
    "gap": {},
    "csra": {"H": 2},
    "ml_decoder": {"G": 8},
    "transformer_decoder": {},
    "zero_shot": {"G": 8},
}


def _cases() -> dict[str, dict[str, Any]]:
    """Every head, layout and loss, classes and groups that no number of devices divides; by a title."""
    found: dict[str, dict[str, Any]] = {}
    for layout in LAYOUTS:
        for head, more in HEADS.items():
            case = {"head": head, "layout": layout, "dims": {**DIMS, **more}}
            found[f"{head}, bce, {layout}"] = {**case, "loss": "bce"}
            found[f"{head}, asl, {layout}"] = {
                **case,
                "loss": "asl",
                "labels": 3,
                "ignore": True,
                "sample_weight": True,
            }
            found[f"{head}, softmax, {layout}"] = {**case, "loss": "softmax", "labels": 1}
        gap = {"head": "gap", "layout": layout, "dims": DIMS, "loss": "bce"}
        found[f"mask, {layout}"] = {**gap, "ignore": True}
        found[f"devices without classes, {layout}"] = {**gap, "dims": {**DIMS, "C": 2}, "labels": 1}
        found[f"fp16, {layout}"] = {**gap, "loss": "softmax", "labels": 1, "dtype": "float16"}
        for head in ("gap", "csra", "ml_decoder"):
            case = {"head": head, "layout": layout, "dims": {**DIMS, **HEADS[head]}, "loss": "bce"}
            found[f"two axes, {head}, {layout}"] = {**case, "replicas": 2}
    return found


CASES = _cases()
MEMORY = scale.MEMORY[0]
# One of each collective.
WIRE = {
    f"{case['head']}, {case['layout']}": case for case in scale.TRAFFIC[:8] if case["head"] in ("gap", "ml_decoder")
}


@pytest.fixture(scope="module")
def measured() -> dict[int, dict[str, list[Any]]]:
    """For each number of processes and title what each process found."""
    found = {}
    for processes in scale.WORLDS:
        todo = {name: ("count", case) for name, case in CASES.items() if case.get("replicas", 1) < processes}
        own_network = processes == 2 and not scale.why_not_own_network()
        if processes == 2:
            todo |= {"memory": ("memory", MEMORY)} if peak() else {}
            todo |= {f"wire {i}": ("wire", case) for i, case in WIRE.items() if own_network}
        results = scale.launch(processes, list(todo.values()), own_network)
        found[processes] = {name: [result[i] for result in results] for i, name in enumerate(todo)}
    return found


@pytest.mark.parametrize(
    ("processes", "name"),
    [(n, name) for n in scale.WORLDS for name, case in CASES.items() if case.get("replicas", 1) < n],
)
def test_every_collective_is_in_the_formula(measured: Any, processes: int, name: str) -> None:
    case = CASES[name]
    formula = scale.traffic_of(case, processes).sent
    if case["loss"] == "softmax" and case.get("dtype") != "float16" and _backend.unavailable("cpp"):
        formula["statistics"] *= 2  # the reference makes them again for the gradients
    assert scale.sent(scale.most(measured[processes][name]), case, processes) == formula
    for counted in measured[processes][name]:  # on a device of fewer classes their gradients are smaller, nothing else
        assert {**scale.sent(counted, case, processes), "parameter_gradients": 0} == {
            **formula,
            "parameter_gradients": 0,
        }


@pytest.mark.parametrize("name", WIRE)
def test_the_wire_carries_at_most_a_tenth_more(measured: Any, name: str) -> None:
    if why := scale.why_not_own_network():
        pytest.skip(f"needs a network of its own: {why}")
    counted, carried = measured[2][f"wire {name}"][0]
    expected = sum(scale.sent(counted, WIRE[name], 2).values())
    assert expected <= carried <= 1.1 * expected


def test_memory_of_a_device_is_within_5_percent(measured: Any) -> None:
    if not peak():
        pytest.skip("needs the peak of Linux's /proc")
    formula = scale.memory_of(MEMORY, 2).total
    for most in measured[2]["memory"]:
        assert abs(most - formula) <= 0.05 * formula, (most / 2**20, formula / 2**20)


def test_what_a_collective_sends() -> None:
    sent = {
        name: Move("loss", name, 12, 4).sent for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    }
    assert sent == {"all_reduce": 18.0, "all_gather": 36.0, "reduce_scatter": 9.0, "all_to_all": 9.0}
    assert Move("loss", "all_gather", 12, 1).sent == 0


def test_a_million_classes_by_hand() -> None:
    with torch.device("meta"):
        head = MLDecoder(2048, 1_000_000, groups=104, embed_dim=768, dtype=torch.bfloat16)
    traffic = step_traffic(head, 8, 64, input_layouts=Shard(0), labels=320)
    one_way = 7 / 8 * 2 * 64 * 104 * 768
    targets = 7 * (24 + 8 * 64 + 8 * 320)
    assert traffic.sent["features"] == one_way + 7 * 8
    assert traffic.sent["feature_gradients"] == one_way
    assert traffic.sent["targets"] == targets
    assert traffic.total == 2 * one_way + 7 * 8 + targets + 2 * 7 / 8 * 4
    same = step_traffic(head, 8, 64)
    assert same.total == 7 * 2 * 64 * 13 * 768 + 7
    memory = head_memory(1_000_000, 768, 64, groups=104, dtype=torch.bfloat16, devices=8, own_images=True)
    assert memory.weights == memory.gradients == 2 * 13 * 9616 * 769
    assert memory.optimizer == 2 * memory.weights
    assert memory.features == 2 * 2 * 768 * (64 * 104 + 8 * 64 * 13)
    dense = head_memory(1001, 8, 3, devices=2, loss_in_head=False, optimizer="none")
    assert (dense.weights, dense.logits) == (4 * 501 * 9, 3 * 1001 * 12 + 2 * 4 * 3 * 501)


def test_wrong_arguments_are_named() -> None:
    head = GAPHead(4, 10)
    with pytest.raises(TypeError, match="step_traffic: head must be a head of"):
        step_traffic(torch.nn.Linear(2, 2), 2, 2)
    with pytest.raises(ValueError, match="step_traffic: devices must be"):
        step_traffic(head, 0, 2)
    with pytest.raises(TypeError, match=r"input_layouts must be Replicate\(\) or Shard\(0\)"):
        step_traffic(head, 2, 2, input_layouts=Shard(1))
    with pytest.raises(ValueError, match="head_memory: fused_update must be False with several devices"):
        head_memory(10, 10, 10, devices=2, fused_update=True)
    with pytest.raises(ValueError, match="head_memory: devices must be"):
        head_memory(10, 10, 10, devices=0)


def test_the_page_is_what_the_rows_give() -> None:
    folder = scale.machine.ROOT / "benchmarks" / "results"
    if not any(folder.rglob("*.jsonl")):
        pytest.skip("no result files: not a checkout")
    text = scale.PAGE.read_text()
    assert scale.page(text, scale.all_rows()) == text


def test_a_newer_row_and_a_wrong_count_show() -> None:
    case = scale.TRAFFIC[0]
    about = {
        "kind": "scale", "scale": "traffic", "case": case, "processes": 2, "commit": "a0", "dirty": False,
        "device": "Some CPU", "versions": {"torch": "2.11.0"},
    }  # fmt: skip
    old = {**about, "time": "2026-01-01", "formula": {"loss": 1e6}, "counted": {"loss": 1e6}, "wire_bytes": 2e6}
    new = {**about, "time": "2026-01-02", "formula": {"loss": 1e6}, "counted": {"loss": 2e6}, "wire_bytes": None}
    assert scale.newest([new, old]) == [new]
    assert "| 2 | 1.00 | as the formula | 2.00 | 2.000 |" in scale.measured_tables([old])
    assert "| 2 | 1.00 | **differs** | not permitted | - |" in scale.measured_tables([new])
    assert scale.measured_tables([]) == "Not yet measured."


def test_measuring_writes_rows(measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    case = CASES["gap, softmax, own images"]
    counted, answers = measured[2]["gap, softmax, own images"][0], {"memory": 7}
    answers |= {"count": counted, "wire": (counted, 8)}
    monkeypatch.setattr(scale, "TRAFFIC", [case])
    monkeypatch.setattr(scale, "launch", lambda n, todo, own: [[answers[name] for name, _ in todo]] * n)
    assert scale.main(["--processes", "2", "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = scale.newest(records.read_rows(tmp_path / "rows.jsonl"))
    assert [row["scale"] for row in rows] == ["traffic"] + ["memory"] * len(scale.MEMORY)
    assert sum(rows[0]["counted"].values()) > 0
    assert rows[0]["wire_bytes"] == (None if scale.why_not_own_network() else 8)
