# The two commands: `make demo` and `make test`. Each sets up everything it needs in .venv; nothing global is touched.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint types bench bench-spine bench-structure bench-training bench-hogwild bench-hardware bench-parallel bench-faults bench-engines bench-user-models bench-timm bench-widths matrix bench-gpu fuzz kills clean

BIN := .venv/bin
CODE := src tests benchmarks examples
FIND := for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done
PYTHON ?= $(shell $(FIND))
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
UNTIMED := tests/system/test_bad_inputs.py tests/system/test_parallel.py tests/system/test_ready_made.py tests/system/test_recipes.py
UNITS := not slow and not gpu and not network

help:  ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Quadriga needs Python 3.11 or newer with its venv module, and none was found."; \
		echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12"; exit 1; } >&2
	@echo "[install] a virtual environment in .venv, by $(PYTHON)"
	@$(PYTHON) -m venv .venv

# `demo` needs the run stamp only; the dev stamp covers it. A stamp is older than what it depends on → install again.
.venv/.run-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "[install] quadriga with ONNX Runtime and OpenVINO, versions from constraints.txt (PyTorch is large: some minutes)"
	@$(PIP) hatchling
	@$(PIP) --no-build-isolation -e ".[onnx,openvino]"
	@touch $@

.venv/.dev-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "[install] quadriga with ONNX Runtime, OpenVINO and the test tools, versions from constraints.txt"
	@$(PIP) hatchling
	@$(PIP) --no-build-isolation -e ".[onnx,openvino,dev]"
	@touch .venv/.run-stamp $@

install: .venv/.dev-stamp  ## set up .venv with everything, the test tools too
	@echo "[install] ready: $(BIN)/quadriga"

demo: .venv/.run-stamp  ## optimize the mission's CNN by all four families and prove it (10 minutes)
	@echo "[demo] LeNet on Fashion-MNIST; the report will be demo-out/report.html. Stop at will: make demo goes on."
	QUADRIGA_DATA=shipped $(BIN)/quadriga run lenet_fashion --floor -0.5pt --minimize latency --limit bytes=0.2 --budget 9m --out demo-out

test: install lint types  ## everything that CI runs: lint, types, unit, contract and system tests, doctests, README blocks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(UNITS)" -n 2 --dist worksteal src tests/unit tests/contract $(UNTIMED)
	$(BIN)/python -m pytest -m "$(UNITS)" tests/system $(addprefix --ignore=,$(UNTIMED))

test-all: install lint types  ## the slow tests too, with every extra
	@$(PIP) --no-build-isolation -e ".[all,dev]"
	$(BIN)/python -m pytest -m "not gpu and not network"

lint: .venv/.dev-stamp  ## format and rules
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/ruff check $(wildcard $(CODE))

types: .venv/.dev-stamp  ## mypy, strict over the core, the composer and the public interface
	$(BIN)/mypy

# The data that every checkout has, so that tables can be compared.
bench bench-spine bench-structure bench-training bench-hogwild bench-hardware bench-parallel bench-faults: export QUADRIGA_DATA = shipped
bench: bench-spine bench-structure bench-training bench-hogwild bench-hardware bench-parallel bench-faults bench-engines matrix  ## every table of docs/, in one go (hours; each goes on where it stopped)

bench-spine: .venv/.run-stamp  ## the mission's own combination, as a table; coverage of every interval and the A/A test
	$(BIN)/python benchmarks/mission.py
	$(BIN)/python benchmarks/intervals.py

bench-structure: .venv/.dev-stamp  ## bytes of LeNet; gradual pruning; to_latency and its word; Torch-Pruning, recovered alike; the zoo (hours)
	$(BIN)/quadriga fetch mobilenetv2_fashion
	$(BIN)/quadriga fetch minilm_wordnet
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/gradual.py
	$(BIN)/python benchmarks/to_latency.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/zoo.py

bench-training: .venv/.dev-stamp  ## the loop beside other trainers; augmentations and optimizers beside others'; what training costs (2 hours)
	@$(PIP) --no-build-isolation -e ".[onnx,openvino,dev,bench]"
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/augment.py
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/train_cost.py

bench-hogwild: .venv/.run-stamp  ## workers on shared weights beside serial SGD: quality and staleness (20 minutes)
	$(BIN)/python benchmarks/hogwild.py

bench-hardware: .venv/.dev-stamp  ## every runtime and precision beside other tools' own int8, and what the search picks (an hour)
	@$(PIP) --no-deps executorch torchao ruamel.yaml tabulate flatbuffers
	$(BIN)/python benchmarks/hardware.py

bench-parallel: .venv/.run-stamp  ## training in 2 and 4 processes against one: gradients, weights, memory, traffic, checkpoints (10 minutes)
	$(BIN)/python benchmarks/parallel.py

bench-faults: .venv/.run-stamp  ## kill one of two processes that train, twenty times, and look how they go on (10 minutes)
	$(BIN)/python benchmarks/faults.py

bench-engines: .venv/.dev-stamp  ## what it costs to hand out trials: the local engine, Ray's, and Ray Tune (8 minutes)
	@$(PIP) "ray[tune]"
	$(BIN)/python benchmarks/engines.py

bench-user-models: .venv/.dev-stamp  ## models as people bring them, through check, train in four runtimes and a short run (3 hours)
	$(BIN)/python benchmarks/user_models.py

bench-timm: .venv/.dev-stamp  ## the smallest network of each of timm's modules: exports, folding, pruning, low rank, int8 (3 hours)
	@$(PIP) --no-deps timm
	@test -d out/timm || $(PIP) --no-deps --target out/timm torchvision  # apart: a build for another torch breaks what looks for it
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/timm_networks.py

bench-widths: .venv/.dev-stamp  ## widths that each runtime runs fast, and networks pruned to them (25 minutes)
	@$(PIP) --no-deps timm
	@test -d out/timm || $(PIP) --no-deps --target out/timm torchvision  # apart: a build for another torch breaks what looks for it
	$(BIN)/python benchmarks/widths.py

matrix: .venv/.dev-stamp  ## every ordered pair of methods on a CNN, an LSTM and a GPT (half an hour)
	$(BIN)/python benchmarks/matrix.py --jobs 2

kills: .venv/.run-stamp  ## SIGKILL a study right before its writes, each time run the same command again; KILLS=1000 for a night (20 minutes)
	$(BIN)/python benchmarks/kills.py --kills $(or $(KILLS),10)

fuzz: .venv/.dev-stamp  ## 10,000 mutations for each parser (an hour)
	QUADRIGA_MUTATIONS=10000 $(BIN)/python -m pytest tests/unit/test_fuzz.py --timeout 7200

bench-gpu: .venv/.dev-stamp  ## what needs an NVIDIA GPU: its tests; training steps and finished networks as a line of JSON
	$(BIN)/python -m pytest -m gpu tests/unit
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove .venv, caches and outputs
	rm -rf .venv build dist demo-out out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
