"""Metrics at many classes and images: their memory, and more than one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peak import printed_by

from mlhead import SparseTargets, _average_precision
from mlhead.metrics import MultiLabelMetrics, TopKAccuracy, TopKMetrics, ZeroShotMetrics

_MEMORY = """
import sys, torch
from mlhead import SparseTargets
from mlhead._resident import peak
from mlhead.metrics import MultiLabelMetrics
B, C, images, labels = map(int, sys.argv[1:])
torch.set_num_threads(1)
def run(images):
    metrics, offsets, apart = MultiLabelMetrics(C), torch.arange(B + 1) * labels, C // labels
    for start in range(0, images, B):
        chosen = torch.randint(apart, (B, labels)) + torch.arange(labels) * apart
        metrics.update(torch.randn(B, C), SparseTargets(chosen.flatten(), offsets, None, C))
    metrics.compute()
run(B)
before = peak()
run(images)
print(peak() - before)
"""


def test_memory_is_that_of_the_scores():
    B, C, images, labels = 40, 2000, 8000, 5
    scores, positives = 4 * images * C, images * labels
    block = 4 * _average_precision._BLOCK
    # 8 bytes of a positive are kept; putting all in order takes their concatenation (8), what is in order (8 with the
    # class), and the order (8). One class takes 4 + 8 bytes an image. A batch is in the first measurement already.
    allowed = scores + block + 32 * positives + 12 * images + 4 * 2**20
    assert block < scores / 2
    assert scores < printed_by(_MEMORY, B, C, images, labels) < allowed


CASES = [(5, 37, 23), (1, 8, 9), (7, 0, 30), (3, 12, 0)]  # classes, and the images of two processes


def seen(case):
    """The metrics of one case, and its images as (logits, targets with unknown labels, labels of one each)."""
    C, *images = CASES[case]
    generator = torch.Generator().manual_seed(case)
    logits = torch.randn(sum(images), C, generator=generator).mul(4).round() / 4
    drawn = torch.rand(sum(images), C, generator=generator)
    targets = (drawn < 0.3).float().masked_fill(drawn > 0.8, -1)
    targets[torch.randint(sum(images), (C,), generator=generator), torch.arange(C)] = 1
    metrics = [MultiLabelMetrics(C), TopKAccuracy(C, (1,)), TopKMetrics((1,))]
    return metrics + ([ZeroShotMetrics(1, C)] if C > 1 else []), (logits, targets, drawn.argmax(1))


def update(metrics, logits, targets, classes):
    for some in torch.arange(len(logits)).split(10):
        sparse = SparseTargets.from_dense(targets[some])
        metrics[0].update(logits[some], sparse)
        metrics[1].update(logits[some], classes[some])
        metrics[2].update(logits[some].argmax(1, keepdim=True), sparse)
        for zero_shot in metrics[3:]:
            zero_shot.update(logits[some], sparse)


def process(rank, file, results):
    """One of two processes; writes what it computes, and the most that it got in one exchange."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    _average_precision._BLOCK, exchange, most = 64, dist.all_to_all_single, 0

    def counted(output, *rest, **options):
        nonlocal most
        most = max(most, output.numel() if output.dtype == torch.float32 else 0)
        exchange(output, *rest, **options)

    dist.all_to_all_single = counted
    found = []
    for case, (_, first, _) in enumerate(CASES):
        metrics, data = seen(case)
        mine = slice(None, first) if rank == 0 else slice(first, None)
        update(metrics, *(t[mine] for t in data))
        found.append([each.compute(dist.group.WORLD) for each in metrics])
    messages = []
    for each in [MultiLabelMetrics(2), TopKAccuracy(2, (1,)), ZeroShotMetrics(1, 2), TopKMetrics((1,))]:
        try:
            each.compute(dist.group.WORLD)
        except ValueError as error:
            messages.append(str(error))
    torch.save({"found": found, "messages": messages, "most": most}, f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path / "meeting", tmp_path / "results"), nprocs=2)
    got = [torch.load(f"{tmp_path}/results.{rank}") for rank in range(2)]
    for case in range(len(CASES)):
        metrics, data = seen(case)
        update(metrics, *data)
        want = [each.compute() for each in metrics]
        assert got[0]["found"][case] == got[1]["found"][case] == want, CASES[case]
    for rank in range(2):
        assert all("the data must be at least one image, got none" in message for message in got[rank]["messages"])
        assert len(got[rank]["messages"]) == 4
        # A process gets 64 scores at a time, or those of one class, which has at most 60 images here.
        assert 0 < got[rank]["most"] <= 64
