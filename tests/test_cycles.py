"""The cycle model of machine code: what it reads of a kernel, its arithmetic by hand, one kernel as it is shipped."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest

from benchmarks import cycles
from benchmarks.cost.devices import ASSUMED, Resources, Work
from benchmarks.cost.sites import BY_TITLE
from benchmarks.machine import ROOT

DEVICE = cycles.DEVICE
# The address, the instruction, its stall count: a prologue, a loop from 0x0020 on, an epilogue.
PROGRAM = (
    ("S2R R0, SR_TID.X", 4),
    ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P0", 1),
    ("DEPBAR.LE SB0, 0x2", 2),
    ("BAR.SYNC.DEFER_BLOCKING 0x0", 5),
    ("@!PT LDS RZ, [RZ]", 1),
    ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 1),
    ("HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", 1),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 3),
    ("@P1 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P0", 1),
    ("LDGDEPBAR", 1),
    ("@!P5 BRA 0x0020", 15),
    ("SHFL.BFLY PT, R3, R4, 0x2, 0x1f", 2),
    ("MUFU.EX2 R3, R3", 1),
    ("FMNMX R3, R3, R4, !PT", 2),
    ("FADD R3, R3, R4", 2),
    ("STS.64 [R9], R4", 1),
    ("STG.E desc[UR4][R2.64], R3", 1),
    ("@!P0 EXIT", 5),
    ("EXIT", 5),
    ("BRA 0x0130", 0),
)


def text(program=PROGRAM) -> str:
    lines = []
    for i, (instruction, stall) in enumerate(program):
        lines.append(f"        /*{16 * i:04x}*/    {instruction} ;    /* 0x00000a00ff017b82 */")
        lines.append(f"                                      /* 0x{1 << 45 | stall << 41 | 1 << 40:016x} */")
    return "\n".join(lines)


def counts(**units):
    return pytest.approx({**dict.fromkeys(("shuffle", "special", "alu", "L2"), 0.0), **units})


def work(registers=255, programs=DEVICE.multiprocessors + 1, dram=0.0) -> Work:
    return Work("k", "", programs, 8, Resources(registers, 0), dram, 0.0, rounds=10)


def test_a_program_is_counted():
    code = cycles.read_code(text(), warps=8)
    share = cycles.CACHE_BYTES / DEVICE.multiprocessors
    copied = 8 * 32 * 16
    assert code.prologue == counts(issue=4, chain=5, L2=copied / share, **{"shared memory": copied / 128})
    # Two warpgroups; the second product has its A in registers.
    operands = 2 * (2048 + 32 * 128) + 2 * 32 * 256
    assert code.loop == counts(
        issue=18, chain=30 + cycles.BARRIER, tensor=2 * (64 + 128), L2=copied / share,
        **{"shared memory": (operands + copied) / 128},
    )  # fmt: skip
    # The jump behind the last EXIT never runs.
    assert code.epilogue == counts(
        issue=16, chain=19, shuffle=8, special=16, alu=4, L2=8 * 32 * 4 / share, **{"shared memory": 8 * 32 * 8 / 128}
    )
    assert not code.waits
    assert code.ahead == 3  # a group for each step, two left under way


def test_the_peak_is_that_of_the_device():
    (product,) = cycles.instructions(text((PROGRAM[5], ("EXIT", 0))))[:1]
    flops = 2 * 64 * 128 * 16
    rate = DEVICE.tensor / DEVICE.multiprocessors / DEVICE.clock
    assert cycles.section([product], warps=4)["tensor"] == pytest.approx(flops / rate, rel=1e-3)


def test_times_by_hand():
    code = cycles.read_code(text(), warps=8)
    edges = ASSUMED.start_cycles + ASSUMED.latency_cycles + code.prologue["L2"] + code.epilogue["L2"]
    alone = cycles.modelled(code, work())
    assert (alone.resident, alone.most, alone.step) == (1, 2, 384)
    assert alone.seconds * DEVICE.clock == pytest.approx(2 * (edges + 3840))
    shared = cycles.modelled(code, work(registers=128))
    assert shared.bound == "tensor of 2 programs"
    assert shared.seconds * DEVICE.clock == pytest.approx(edges + 2 * 3840)
    # One program on each multiprocessor shares it with none.
    single = cycles.modelled(code, work(registers=128, programs=DEVICE.multiprocessors))
    assert single.seconds * DEVICE.clock == pytest.approx(edges + 3840)
    assert cycles.modelled(code, work(dram=1e9)).bound == "memory"
    assert cycles.modelled(code, work(registers=256)).seconds == math.inf


def test_what_is_copied_ahead_counts_once():
    code = cycles.read_code(text(), warps=8, cache=1024)
    copies, stores = code.loop["L2"], code.epilogue["L2"]
    edges = ASSUMED.start_cycles + ASSUMED.latency_cycles + copies + stores
    found = cycles.modelled(code, work(registers=128))
    assert found.bound == "L2 of 2 programs"
    assert found.seconds * DEVICE.clock == pytest.approx(edges + 2 * (10 * copies + stores))


def test_the_main_loop_is_the_innermost():
    nested = (*PROGRAM[:11], ("@P2 BRA 0x0000", 1), *PROGRAM[11:])
    assert cycles.main_loop(cycles.instructions(text(nested))) == slice(2, 11)


def test_waiting_for_products_and_for_loads():
    waiting = cycles.read_code(text().replace("gsb0, 0x1", "gsb0, 0x0"), warps=8)
    assert waiting.waits
    assert cycles.modelled(waiting, work()).step == pytest.approx(384 + 30 + cycles.BARRIER)
    late = cycles.read_code(text().replace("SB0, 0x2", "SB0, 0x0"), warps=8)
    found = cycles.modelled(late, work())
    assert found.step == pytest.approx(ASSUMED.latency_cycles + 30 + cycles.BARRIER)
    assert found.bound.startswith("latency")


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="no loop with matrix instructions"):
        cycles.read_code(text().replace("BRA", "NOP"), warps=8)
    with pytest.raises(ValueError, match="UTMALDG does not say"):
        cycles.read_code(text().replace("SHFL.BFLY", "UTMALDG.2D"), warps=8)


def test_a_shipped_kernel():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.cycles", "--op", "group_fc", "--workload", "million"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "nothing here is measured" in printed
    found = dict(zip(*(re.split(" {2,}", line) for line in printed.splitlines()[-2:]), strict=True))
    site = BY_TITLE["group_fc.forward_tile"]
    tile = site.function()(256, 768, 10_000, 2, True, cycles.kernel_device(DEVICE))
    assert found["configuration"] == cycles.short(tile)
    # All products of a tile, at 2048 multiply-adds a cycle.
    assert float(found["tensor"]) == tile.BLOCK_B * tile.BLOCK_J * tile.BLOCK_E / 2048
    assert found["steps"].startswith(f"{math.ceil(768 / tile.BLOCK_E)} x ")
    assert 0 < float(found["of peak"]) <= 1


@pytest.mark.parametrize(
    ("interpreted", "arguments", "message"),
    [("0", ["--workload", "nowhere"], "no workload is left"), ("1", [], "TRITON_INTERPRET is set")],
)
def test_bad_calls(interpreted, arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(SystemExit):
        cycles.main(arguments)
    assert message in capsys.readouterr().err
