"""Devices by their published numbers, and how long a launch of so much work takes on one: the model's arithmetic.

    time = launch + sum over waves of max(matrices, lanes, accesses, shared memory, L2, memory, latency)

A wave is as many programs as the device holds at once. Nothing here is measured: peaks are the vendor's, and what is
called assumed is a guess. `python -m benchmarks.model --against` holds the result against measured rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """A GPU. Rates are published peaks, dense.

    Args:
        name: Its name.
        capability: Ten times the major plus the minor compute capability.
        multiprocessors: Number of streaming multiprocessors.
        bandwidth: Bytes per second from and to memory.
        tensor: FLOP per second of matrix products in 16 bits.
        tf32: The same in TF32.
        lanes: FLOP per second of plain fp32, a multiply-add counted as two.
        clock: Cycles per second that give the peak in 16 bits, at 2048, 4096 and (derived from it) 8192 FLOP a cycle.
        program_bytes: Shared memory that one program may use.
        shared_bytes: Shared memory of a multiprocessor.
        cache_bandwidth: Bytes per second from L2, as third parties measured it; no vendor publishes it.
    """

    name: str
    capability: int
    multiprocessors: int
    bandwidth: float
    tensor: float
    tf32: float
    lanes: float
    clock: float
    program_bytes: int
    shared_bytes: int
    cache_bandwidth: float


# Where the numbers are from. Data sheets give rates with sparsity, twice those here.
#   A100: "NVIDIA A100 Tensor Core GPU" data sheet (80 GB, SXM) and the Ampere white paper, as summed up in
#     https://glennklockwood.com/garden/processors/A100.
#   H100: "NVIDIA H100 Tensor Core GPU" data sheet (SXM5) as in
#     https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html, which rounds 494.7 and 66.9 TFLOP/s; these and the
#     clock are those of the Hopper white paper as in https://glennklockwood.com/garden/processors/h100.
#   B200: NVIDIA's table of GB200 NVL72 and HGX B200, the latter, as quoted in
#     https://zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html. It rounds TF32 to 1100 TFLOP/s, half of
#     the rate in 16 bits before rounding is taken. Multiprocessors and clock are not NVIDIA's own numbers but those of
#     https://hmc-tech.com/gpus/nvidia-b200-vs-nvidia-b100; earlier sheets state 8 TB/s.
#   Shared memory: the tuning guides of CUDA, https://docs.nvidia.com/cuda/ampere-tuning-guide (164 KB, of which 163 for
#     a program), hopper-tuning-guide and blackwell-tuning-guide (228 and 227).
#   L2: read bandwidth in the rows of https://github.com/te42kyfo/gpu-benches, folder gpu-l2-cache: 5.4 TB/s on an A100
#     80 GB, 9.8 on an H200 with the same multiprocessors and clock as an H100 SXM (6.9 on an H100 PCIe, which has fewer
#     and less power). B200: the H200's bytes a cycle and multiprocessor, assumed.
#   The originals of the data sheets and of the white papers were not at hand.
DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 80, 108, 2.039e12, 312e12, 156e12, 19.5e12, 1.41e9, 166_912, 167_936, 5.4e12),
    "sm_90": Device("H100 SXM", 90, 132, 3.35e12, 989.4e12, 494.7e12, 66.9e12, 1.83e9, 232_448, 233_472, 9.8e12),
    "sm_100": Device("B200", 100, 148, 7.7e12, 2250e12, 1125e12, 75e12, 1.86e9, 232_448, 233_472, 11e12),
}
H200_BANDWIDTH = 4.8e12  # as in https://aiwiki.ai/wiki/nvidia_h200; in all else it is the H100


@dataclass(frozen=True)
class Assumed:
    """What no one publishes: guesses, the same for all devices.

    Args:
        launch_s: Seconds that a launch costs behind another one in the queue.
        start_cycles: Cycles from the start of a program to its first load, and from its last store to its end.
        latency_cycles: Cycles that a load from memory takes.
        step_cycles: Cycles between the products of a loop that only another program fills.
        vendor_share: What of the peak a product by the vendor's library reaches.
        triton_share: What of the peak a loop of tl.dot reaches whose operands are there.
        older_share: What of the peak the instructions of sm_80 reach on later devices.
        bandwidth_share: What of the memory's bandwidth a kernel reaches.
        base_registers: Registers of a thread besides its accumulators and operands.
    """

    launch_s: float = 2.5e-6
    start_cycles: float = 500.0
    latency_cycles: float = 700.0
    step_cycles: float = 60.0
    vendor_share: float = 0.75
    triton_share: float = 0.7
    older_share: float = 0.6
    bandwidth_share: float = 0.9
    base_registers: int = 40


ASSUMED = Assumed()
REGISTERS = 65_536  # of a multiprocessor
PARTITIONS = 4  # of a multiprocessor; a warp's registers are in one
MOST_WARPS, MOST_PROGRAMS = 64, 32  # that it holds


@dataclass(frozen=True)
class Resources:
    """What a program takes: registers of a thread, bytes of shared memory."""

    registers: int
    shared: int


@dataclass(frozen=True)
class Work:
    """One kernel's launch. Counts are those of one program unless said otherwise.

    Args:
        kernel: Name of the kernel, or of what the vendor's library does.
        site: The configuration function that it was launched by, "" where it has none.
        programs: Programs of the launch.
        warps: Warps of a program.
        resources: What a program takes.
        dram: Bytes of the whole launch from and to memory, those that L2 keeps counted once.
        cache: Bytes through L2.
        matrix: FLOP of matrix products, padding included, over the rate's share: what the peak would do meanwhile.
        rate: Which peak: "tensor", "tf32" or "lanes".
        lanes: Operations of plain fp32, padding included.
        accesses: Elements loaded and stored over the elements of one access.
        shared: Bytes to and from shared memory.
        rounds: Loads that wait for one another.
        depth: How many of them are under way at once; 0 where none is while the program multiplies.
        times: How many such launches there are.
    """

    kernel: str
    site: str
    programs: int
    warps: int
    resources: Resources
    dram: float
    cache: float
    matrix: float = 0.0
    rate: str = "tensor"
    lanes: float = 0.0
    accesses: float = 0.0
    shared: float = 0.0
    rounds: float = 1.0
    depth: int = 1
    times: int = 1

    def given(self, resources: Resources) -> Work:
        """The same with the resources that a compiler reported in place of the assumed ones."""
        return replace(self, resources=resources)


@dataclass(frozen=True)
class Time:
    """Seconds of a work, all its launches, what decides, and how it is spread.

    Args:
        seconds: Of all launches.
        bound: What decides a full wave.
        resident: Programs that a multiprocessor holds at once.
        waves: Waves of a launch.
    """

    seconds: float
    bound: str
    resident: int
    waves: int


def occupancy(resources: Resources, warps: int, device: Device) -> int:
    """Programs that a multiprocessor holds at once, 0 where not even one fits.

    min(65536 / (32 warps registers), shared memory / (shared + 1 KB), 64 / warps, 32); registers come in eights, whole
    warps of them in each quarter of the multiprocessor, and shared memory in 128 bytes.
    """
    if resources.registers > 255 or resources.shared > device.program_bytes:
        return 0
    registers = max(16, -(-resources.registers // 8) * 8)
    by_registers = REGISTERS // PARTITIONS // (32 * registers) * PARTITIONS // warps
    by_shared = device.shared_bytes // (-(-resources.shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, MOST_WARPS // warps, MOST_PROGRAMS)


def wave(work: Work, programs: int, resident: int, device: Device) -> tuple[float, str]:
    """Seconds of `programs` programs at once, and what decides.

    With k = ceil(programs / multiprocessors), the most programs of a multiprocessor, the largest of

        of the device          programs cache / L2 bandwidth,  dram's share of the wave / bandwidth
        of a multiprocessor    k matrix / rate + step rounds / (resident clock),  k lanes / rate,
                               k accesses / (32 clock),  k shared / (128 B clock)
        of one program         (start + latency rounds / depth) / clock, and matrix / rate where depth is 0

    and first = (start + latency) / clock, of which other programs hide all but 1 / resident, but for the last line.
    """
    k = math.ceil(programs / device.multiprocessors)
    rates = {"tensor": device.tensor, "tf32": device.tf32, "lanes": device.lanes}
    first = (ASSUMED.start_cycles + ASSUMED.latency_cycles) / device.clock
    alone = work.matrix / (rates[work.rate] / device.multiprocessors)
    waiting = ASSUMED.start_cycles + ASSUMED.latency_cycles * max(1.0, work.rounds / max(1, work.depth))
    times = {
        "matrices": alone * k + (ASSUMED.step_cycles * work.rounds / resident / device.clock if alone else 0.0),
        # An operation that is no multiply-add is half of what the peak counts.
        "lanes": work.lanes / (0.5 * device.lanes / device.multiprocessors) * k,
        "accesses": work.accesses / (32 * device.clock) * k,
        "shared memory": work.shared / (128 * device.clock) * k,
        "L2": programs * work.cache / device.cache_bandwidth,
        "memory": work.dram * programs / work.programs / (device.bandwidth * ASSUMED.bandwidth_share),
    }
    # What no other program hides is waited for once more: of one of the programs, or of the only one.
    times = {name: value + first / resident for name, value in times.items()}
    times["latency"] = waiting / device.clock + (alone if work.depth == 0 else 0.0) + first
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def seconds(work: Work, device: Device) -> Time:
    """All launches of a work: times (launch + full waves + what is left); infinite where a program does not fit."""
    resident = occupancy(work.resources, work.warps, device)
    if resident == 0:
        return Time(math.inf, "does not fit", 0, 0)
    slots = resident * device.multiprocessors
    full, rest = divmod(work.programs, slots)
    each, bound = wave(work, min(slots, work.programs), resident, device)
    last = wave(work, rest, max(1, math.ceil(rest / device.multiprocessors)), device)[0] if rest else 0.0
    total = work.times * (ASSUMED.launch_s + full * each + last)
    return Time(total, bound, resident, full + bool(rest))


def total(works: list[Work], device: Device) -> float:
    """Seconds of several works, one after another."""
    return sum(seconds(work, device).seconds for work in works)
