# Every target does its own set-up in .venv. `make run` is the main job; `make test` and `make check` are what CI runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# Two test workers share the machine: one thread each beats oversubscription.
WORKERS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: run test test-slow check format bench bench-plan bench-budget bench-target bench-rl docs clean

run: .venv/.installed-run
	$(BIN)/natgrad compare digits --budget 3s --seeds 3 --threads 1 --out runs/digits

test: .venv/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -q

test-slow: .venv/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -q -m slow

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/targets.py

bench-plan: .venv/.installed-dev
	$(BIN)/python benchmarks/plan.py

# What 25 seconds reach, untuned, on Fashion-MNIST (Debian: dataset-fashion-mnist); DATA is the folder of its IDX files.
DATA ?= /usr/share/datasets/fashion-mnist
bench-budget: .venv/.installed-dev
	$(BIN)/python benchmarks/budget.py --data $(DATA)

bench-target: .venv/.installed-dev
	$(BIN)/python benchmarks/time_to_target.py

bench-rl: .venv/.installed-dev
	@$(PIP) --editable '.[bench]'
	$(BIN)/python benchmarks/rl.py speed

docs: .venv/.installed-dev
	$(BIN)/python .ci/check_links.py

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed-run: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'Installing natgrad and what it needs into .venv ...'
	@$(PIP) --editable '.[tasks,report,cli]'
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'Installing natgrad and its development tools into .venv ...'
	@$(PIP) --editable '.[dev]'
	@# A dependency of curvlinops brings PyPI's torchvision. Beside a CPU build of torch it cannot be imported, and then
	@# transformers cannot either; nothing here uses it.
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall -qqy torchvision
	@touch $@ .venv/.installed-run
