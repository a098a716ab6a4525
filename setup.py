"""The optional C++/CUDA extension; everything else is in pyproject.toml.

MLHEAD_BUILD says what to build:

* auto (default): the CPU library when torch, ninja and a C++ compiler are there; the CUDA library too when nvcc and a
  CUDA torch are there and a GPU is visible or TORCH_CUDA_ARCH_LIST is set. Whatever is missing or fails to compile is
  left out with one line that says so, and mlhead works without it.
* none: never.
* cpu, cuda: that part (cuda includes cpu), or an error that names what is missing.

Torch is not imported, only found. `pip install .` builds in isolation, where there is no torch, and gives a pure-Python
wheel; `MLHEAD_BUILD=cpu pip install --no-build-isolation .` gives one cp310-abi3 wheel for every torch from 2.11 on:
the libraries use the stable ABI of LibTorch, have no Python entry point, and are loaded by mlhead/_extension.py.

MLHEAD_BUILD_TESTS=1 adds mlhead._C, the pybind11 module that shows csrc's internal functions to pytest. Never in a
wheel.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # which cannot read pyproject.toml
    sys.exit(f"mlhead: setuptools must be 77 or newer, got {setuptools.__version__} (pip install -U setuptools)")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import PlatformError, SetupError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("MLHEAD_BUILD", "auto")
BUILD_TESTS = os.environ.get("MLHEAD_BUILD_TESTS", "0") == "1"
HOW = "MLHEAD_BUILD=cpu pip install --no-build-isolation . builds it"

TORCH_MINIMUM = (2, 11)  # the stable ABI that the libraries ask for
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # where TORCH_CUDA_ARCH_LIST is unset and no GPU is visible
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", *WARNINGS]
# One source, three instruction sets; isa.cpp chooses at run time. GCC's own AVX-512 headers warn about themselves.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
X86_FLAGS = {
    "csrc/gemm_avx2.cpp": AVX2,
    "csrc/gemm_avx512.cpp": [*AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
GEMM = ["csrc/gemm_baseline.cpp", "csrc/gemm_plan.cpp", "csrc/isa.cpp", *(X86_FLAGS if IS_X86 else ())]
CPU_OPS = ("group_fc", "csra_pool", "query_attention", "rows", "class_loss", "group_fc_loss")
CPU_SOURCES = [*GEMM, *(f"csrc/{op}_cpu.cpp" for op in CPU_OPS)]
CPU = Extension("mlhead._mlhead_cpu", CPU_SOURCES, py_limited_api=True)
CUDA_OPS = ("group_fc", "csra_pool", "query_attention", "dropout_add_layer_norm", "relu_dropout", "class_loss")
CUDA_SOURCES = [f"csrc/{op}{end}" for op in CUDA_OPS for end in (".cu", "_cuda.cpp")]
CUDA = Extension("mlhead._mlhead_cuda", CUDA_SOURCES, py_limited_api=True)
TESTS = Extension("mlhead._C", [*GEMM, *(["csrc/gemm_wide.cpp"] if IS_X86 else []), "csrc/bindings.cpp"])


RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  description = $out
rule nvcc
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  description = $out
rule link
  command = $cxx $in $flags -o $out
  description = $out
"""


def say(line: str) -> None:
    """Says one line to whoever builds."""
    print(f"mlhead: {line}", file=sys.stderr, flush=True)


class MissingError(Exception):
    """Something a part of the extension needs is not there; the message names it."""


def output_of(*command: str) -> str:
    """What a command prints, or "" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_ninja() -> str:
    """The ninja of PATH, or of the pip package."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if not found:
        raise MissingError("ninja is not on PATH (pip install ninja)")
    return found


def find_compiler() -> list[str]:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on PATH."""
    if sys.platform == "win32":
        raise MissingError("the extension is not built on Windows")
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if output_of(*command, "--version"):
            return command
    if asked:
        raise MissingError(f"the C++ compiler CXX={shlex.join(asked)} does not run")
    raise MissingError("no C++ compiler: none of c++, g++, clang++ is on PATH, and CXX is not set")


def find_torch() -> dict[str, Any]:
    """Folder, version and CUDA version of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise MissingError("torch is not installed where mlhead is built (with build isolation that is normal)")
    root = Path(spec.origin).parent
    facts = runpy.run_path(str(root / "version.py"))
    version = str(facts["__version__"])
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < TORCH_MINIMUM:
        raise MissingError(f"torch is {version}, and the extension needs 2.11 or later")
    return {"root": root, "version": version, "cuda": facts.get("cuda")}


def find_cuda(torch: dict[str, Any]) -> dict[str, Any]:
    """Folder and version of the CUDA toolkit, and the architectures to build for."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")
    if not nvcc:
        raise MissingError(f"nvcc is not {'in CUDA_HOME=' + home if home else 'on PATH, and CUDA_HOME is not set'}")
    match = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if not match:
        raise MissingError(f"{nvcc} --version does not run")
    if torch["cuda"] is None:
        raise MissingError(f"torch {torch['version']} is built without CUDA")
    if match[1] != torch["cuda"].split(".")[0]:
        raise MissingError(
            f"nvcc is CUDA {match[1]}.{match[2]}, but torch {torch['version']} is built for {torch['cuda']}"
        )
    include = re.search(
        r"^#\$ TOP=(.*)$", subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr, re.M
    )
    root = Path(include[1].strip()) if include else Path(nvcc).resolve().parent.parent
    return {"nvcc": nvcc, "root": root, "version": f"{match[1]}.{match[2]}"}


def visible_architectures() -> str:
    """The compute capabilities of the visible GPUs, such as "8.0;9.0", or ""."""
    lines = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    return ";".join(sorted({line for line in lines if re.fullmatch(r"\d+\.\d+", line)}))


def architecture_flags(nvcc: str) -> tuple[str, list[str]]:
    """The architectures to build for, and nvcc's flags for them."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    names = asked or visible_architectures()
    if not names:  # the defaults, less what an older nvcc does not know
        known = output_of(nvcc, "--list-gpu-arch")
        default = CUDA_ARCHITECTURES.split(";")
        chosen = [a for a in default if f"compute_{re.sub('[^0-9]', '', a)}" in known]
        names = ";".join(chosen)
        if chosen and not names.endswith("+PTX"):  # what newer GPUs compile for themselves
            names += "+PTX"
    flags = []
    for name in filter(None, names.split(";")):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if not match:
            raise MissingError(f"TORCH_CUDA_ARCH_LIST must be numbers such as {CUDA_ARCHITECTURES}, got {name!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return names, flags


def pybind11_include() -> str:
    """Headers of pybind11: the package, or the copy that torch ships."""
    spec = importlib.util.find_spec("pybind11")
    if spec and spec.origin:
        return str(Path(spec.origin).parent / "include")
    return str(find_torch()["root"] / "include")


def ninja_file(ext: Extension, output: str) -> str:
    """The whole build of one library, as text."""
    compiler = find_compiler()
    cxx, link = list(CXX_FLAGS), ["-shared"]
    info: dict[str, Any] = {
        "compiler": output_of(*compiler, "--version").splitlines()[0],
        "machine": platform.machine(),
    }
    if IS_X86:
        cxx.append("-DMLHEAD_X86")
    lines = [f"cxx = {shlex.join(compiler)}", RULES]
    nvcc_flags: list[str] = []
    if ext is TESTS:
        cxx[0] = "-O2"  # half the time to compile
        cxx += ["-isystem", pybind11_include(), "-isystem", sysconfig.get_path("include")]
    else:
        torch = find_torch()
        target = (TORCH_MINIMUM[0] << 56) | (TORCH_MINIMUM[1] << 48)
        cxx += [f"-DTORCH_TARGET_VERSION={target:#018x}", "-isystem", str(torch["root"] / "include")]
        link += [f"-L{torch['root'] / 'lib'}", "-ltorch_cpu", "-lc10"]
        info |= {
            "torch": torch["version"],
            "stable_abi": ".".join(map(str, TORCH_MINIMUM)),
            "flags": shlex.join(CXX_FLAGS),
        }
        info |= {"instruction_sets": ["baseline", *(["avx2", "avx512"] if IS_X86 else [])]} if ext is CPU else {}
    if ext is CUDA:
        cuda = find_cuda(torch)
        names, architectures = architecture_flags(cuda["nvcc"])
        info |= {"cuda": cuda["version"], "torch_cuda": torch["cuda"], "architectures": names}
        nvcc_flags = [
            "-O3",
            "-std=c++17",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            f"-ccbin={compiler[0]}",
            *architectures,
        ]
        cxx += ["-DUSE_CUDA", "-isystem", str(cuda["root"] / "include")]
        # The static runtime: no libcudart to find when the library is loaded, whatever torch brought along.
        folders = [d for d in (cuda["root"] / "lib64", cuda["root"] / "lib") if d.is_dir()]
        link += [*(f"-L{d}" for d in folders), "-ltorch_cuda", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        lines.insert(1, f"nvcc = {cuda['nvcc']}")
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    facts = "-DMLHEAD_BUILD_INFO=" + json.dumps(json.dumps(info))  # for the one file that includes build_info.h
    objects = []
    for source in ext.sources:
        cuda_source = source.endswith(".cu")
        flags = nvcc_flags if cuda_source else [*cxx, *isa_flags(source)]
        if not cuda_source and source not in GEMM:
            flags.append(facts)
        objects.append(Path(source).name + ".o")
        lines.append(f"build {objects[-1]}: {'nvcc' if cuda_source else 'cxx'} {escape(str(ROOT / source))}")
        lines.append(f"  flags = {shlex.join(flags).replace('$', '$$')}")
    lines += [f"build {escape(output)}: link {' '.join(objects)}", f"  flags = {shlex.join(link)}", ""]
    return "\n".join(lines)


def isa_flags(source: str) -> list[str]:
    """The instruction set that one source is compiled for."""
    if not IS_X86:
        return []
    return AVX2 if source == "csrc/gemm_wide.cpp" else X86_FLAGS.get(source, [])


def escape(path: str) -> str:
    """A path in a ninja build line."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def wanted() -> list[Extension]:
    """What to build, by MLHEAD_BUILD and, in auto, by what is there."""
    if MODE not in MODES:
        raise PlatformError(f"mlhead: MLHEAD_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
    if MODE == "none":
        parts = []
    elif MODE in ("cpu", "cuda"):
        parts = [CPU, CUDA] if MODE == "cuda" else [CPU]
    else:
        parts = []
        try:
            find_ninja(), find_compiler()
            torch = find_torch()
            parts.append(CPU)
            if torch["cuda"] and (os.environ.get("TORCH_CUDA_ARCH_LIST") or visible_architectures()):
                find_cuda(torch)
                parts.append(CUDA)
        except MissingError as why:
            say(f"without the {'CUDA part of the ' if parts else ''}extension: {why}; {HOW}")
    return [*parts, TESTS] if BUILD_TESTS else parts


class BuildExtension(build_ext):
    """Builds each library with a ninja file of its own; in auto, leaves out what fails."""

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except MissingError as why:
                self.failed(ext, str(why))
            except subprocess.CalledProcessError as why:
                self.failed(ext, f"ninja failed with status {why.returncode}; the compiler's own words are above")

    def build_extension(self, ext: Extension) -> None:
        """One library."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp, ext.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        text = ninja_file(ext, str(output))
        (folder / "build.ninja").write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([find_ninja(), *jobs, "-C", str(folder)], check=True, stdout=sys.stderr)

    def failed(self, ext: Extension, why: str) -> None:
        """In auto the part is left out; where it was asked for, the build ends."""
        if MODE != "auto" or ext is TESTS:
            raise SetupError(f"mlhead: MLHEAD_BUILD={MODE}: {ext.name} cannot be built: {why}")
        say(f"without {ext.name}: {why}")
        self.extensions.remove(ext)
        if ext in (self.distribution.ext_modules or []):
            self.distribution.ext_modules.remove(ext)


class Wheel(bdist_wheel):
    """A cp310-abi3 wheel with the extension, py3-none-any without."""

    def finalize_options(self) -> None:
        if BUILD_TESTS:
            raise SetupError("mlhead: MLHEAD_BUILD_TESTS=1 is for build_ext; its module must not get into a wheel")
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self) -> None:
        self.run_command("build_ext")  # first, since a failure in auto makes the wheel a pure one
        if not self.distribution.ext_modules:
            self.root_is_pure = True
            self.py_limited_api = False  # type: ignore[assignment]
        super().run()


class SourceDistribution(sdist):
    """csrc always belongs to it, whether the extension can be built here or not."""

    def add_defaults(self) -> None:
        super().add_defaults()
        self.filelist.extend(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir() if p.is_file()))


setup(
    ext_modules=wanted(),
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel, "sdist": SourceDistribution},
)
