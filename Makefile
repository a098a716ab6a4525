# make demo and make test do everything on a fresh machine; neither needs a GPU, both use one that is there.

VENV    ?= .venv
SYSTEM  ?= python3
PY      ?= $(VENV)/bin/python
MINUTES ?= 8
# The C++ extension is built where a compiler is; without one everything runs on plain torch.
BUILD   ?= auto

ifeq ($(PY),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/.ready
endif

.PHONY: demo demo-million demo-zsl test test-all lint format bench audit performance gpu-check extension clean

demo: $(ENVIRONMENT) extension
	$(PY) -m mlhead demo --out runs/demo

demo-million: $(ENVIRONMENT) extension
	$(PY) -m mlhead demo-million --out runs/demo-million

demo-zsl: $(ENVIRONMENT) extension
	$(PY) -m mlhead demo-zsl --out runs/demo-zsl

test: $(ENVIRONMENT) extension
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Also walks every timm architecture and every shipped kernel configuration: about an hour on 2 cores.
test-all: $(ENVIRONMENT) extension
	$(PY) -m pytest -m "slow or not slow"

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(dir $(PY))clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)

bench: $(ENVIRONMENT) extension
	$(PY) -m benchmarks.run

# docs/static_audit.md, without a GPU: nvcc and a quarter of an hour on 2 cores.
audit: $(ENVIRONMENT)
	$(PY) -m benchmarks.audit

# docs/performance.md and its pictures, from the rows under benchmarks/results/.
performance: $(ENVIRONMENT)
	$(PY) -m benchmarks.performance

# On a machine with a GPU; with packages in place and no network: make gpu-check PY=python3
gpu-check: $(ENVIRONMENT)
	$(PY) -m benchmarks.gpu_check --minutes $(MINUTES)

extension: $(ENVIRONMENT)
	MLHEAD_BUILD=$(BUILD) $(PY) setup.py -q build_ext --inplace

$(VENV)/.ready: pyproject.toml constraints.txt
	$(SYSTEM) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info mlhead/*.so .pytest_cache .mypy_cache .ruff_cache
