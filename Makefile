# The project's commands; `make` alone lists them. What they run is printed, to be copied.

VENV := $(CURDIR)/.venv
PYTHON ?= # interpreter for .venv, 3.11 to 3.14; unset: the first one found
DEVICE ?= cuda
OUT ?= build/gpu-check

export PATH := $(VENV)/bin:$(PATH)
export PYTHON
# pyright asks the network for a newer version of itself unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Idle threads of OpenMP sleep instead of spinning: DALI, torch and the other ranks share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

HAS_BROWSER = $(shell command -v chromium || command -v google-chrome || command -v chromium-browser)
HAS_GPU = $(shell $(VENV)/bin/python -c 'import torch; print("yes" if torch.cuda.is_available() else "")')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-ffcv demo test test-long test-matrix format lock gpu-check docs image image-rehearsal clean \
	checks ruff-format ruff-check pyright lint-imports hadolint pytest lint bench bench-all bench-loaders demo-steps

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: ## Make or update .venv (demo, test, lint and format do it first)
	@deploy/setup.sh

demo: setup ## Pack real images, train, evaluate, report: about five minutes on two cores
	@echo '. .venv/bin/activate'
	@$(MAKE) --no-print-directory demo-steps DEMO_CONFIG=$(if $(HAS_GPU),gpu-1,cpu-1)

# nproc knows about affinity; without OMP_NUM_THREADS, accelerate counts the machine's cores and warns that it did.
demo-steps: export OMP_NUM_THREADS ?= $(shell nproc)
demo-steps:
	python -m moco_fast.demo demo/images
	make-shards pack demo/images/train --labels none --out demo/shards
	accelerate launch --config_file deploy/accelerate/$(DEMO_CONFIG).yaml -m moco_fast.train demo --data.shards demo/shards --eval.tasks health --run.out demo/run
	moco-fast report demo/run
	@echo 'That needed no labels. With the folders as labels, which training has not seen:'
	moco-fast eval knn --encoder demo/run --train demo/images/train --test demo/images/val --beside untrained
	moco-fast report demo/run

test: setup-ffcv ## Run every check: format, lint, types, imports, Dockerfile, tests
	@$(MAKE) --no-print-directory --keep-going checks

setup-ffcv: ## The same, and FFCV built against system packages (make test does it first)
	@deploy/setup.sh ffcv

lint: setup ## The checks that take seconds
	@$(MAKE) --no-print-directory --keep-going ruff-format ruff-check pyright lint-imports hadolint

checks: ruff-format ruff-check pyright lint-imports hadolint pytest

ruff-format:
	ruff format --check

ruff-check:
	ruff check

pyright:
	pyright

lint-imports:
	lint-imports

hadolint:
	hadolint Dockerfile

# One thread each: the tests themselves run side by side. Files stay together, for what their tests share. Without a
# GPU, tests/test_fake_cuda.py runs what compares one with the CPU.
pytest: export OMP_NUM_THREADS ?= 1
pytest:
	DEVICE=$(if $(HAS_GPU),cuda,cpu) python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --continue-on-collection-errors --timeout 600 --cov \
		-m "not long$(if $(HAS_GPU),, and not gpu)$(if $(HAS_BROWSER),, and not browser)"

test-long: setup-ffcv ## What takes minutes and proves something rare, such as every family of timm
	OMP_NUM_THREADS=1 DEVICE=$(if $(HAS_GPU),cuda,cpu) python -m pytest -m long

test-matrix: setup-ffcv ## The fast tests on the oldest and the newest Python and packages
	python tests/matrix.py $(ENVIRONMENTS)

format: setup ## Format the code, and repair what ruff can
	ruff check --fix
	ruff format

# FFCV's is a file of its own, for what it adds: no one else needs a compiler.
lock: COMPILE = $$(command -v uv || echo .uv/bin/uv) pip compile --quiet --no-header --generate-hashes --universal --python-version 3.11
# Wheels for aarch64 are looked for, not installed.
lock: AARCH64 = --dry-run --quiet --only-binary :all: --python-version 3.11 --python-platform aarch64-manylinux_2_39 --target build/aarch64
lock: setup ## Resolve pyproject.toml again into requirements.lock and requirements-ffcv.lock
	echo ffcv | $(COMPILE) --all-extras --excludes /dev/stdin --group dev pyproject.toml --output-file requirements.lock
	sed -n 's/==.*//p' requirements.lock | $(COMPILE) --extra ffcv --excludes /dev/stdin pyproject.toml --output-file requirements-ffcv.lock
	$$(command -v uv || echo .uv/bin/uv) pip install $(AARCH64) --requirement requirements.lock

bench: setup ## Every benchmark that a CPU can run, in 15 minutes: benchmarks/results and the README's table
	python benchmarks/run_all.py $(if $(PHOTOS),--photos $(PHOTOS))

bench-all: setup ## These and the longer ones; PYTHONS="mosaic=PATH ..." for what needs an environment of its own
	python benchmarks/run_all.py --more $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(PYTHONS),--python $(PYTHONS))

# Peers pin what others need elsewhere: they get an environment of their own, on top of .venv (whose torch they share).
PEERS := build/bench-loaders
bench-loaders: setup-ffcv ## Our loader beside what others take today, in 10 minutes: benchmarks/results/peers.md
	$$(command -v uv || echo .uv/bin/uv) venv --quiet --allow-existing --python $(VENV)/bin/python $(PEERS)
	$(PEERS)/bin/python benchmarks/loaders/beside.py $(VENV)
	$$(command -v uv || echo .uv/bin/uv) pip install --quiet --python $(PEERS) --no-deps --requirement benchmarks/requirements-loaders.txt
	$(PEERS)/bin/python benchmarks/run_all.py --only peers $(if $(PHOTOS),--photos $(PHOTOS))

# No set-up: machines that have a GPU often have their own Python and torch, and no network.
gpu-check: ## On a GPU: its tests and figures into OUT in 9 minutes; DEVICE=cpu for a small version
	$(if $(wildcard $(VENV)/bin/python),python,$(or $(PYTHON),python3)) benchmarks/gpu_check.py --device $(DEVICE) \
		--out $(OUT) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(PART),--part $(PART)) $(if $(CIFAR),--cifar $(CIFAR))

docs: export NO_MKDOCS_2_WARNING := 1
docs: setup ## The documents and the Python API as a site in build/docs
	mkdocs build --quiet

image: ## Build the Docker image (docs/docker.md)
	docker build --tag moco-fast --build-arg REVISION=$$(git rev-parse HEAD) \
		--build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' moco_fast/__init__.py) .

image-rehearsal: setup ## As root, without Docker: what the Dockerfile does, in a Debian with debootstrap
	python deploy/docker/rehearse_image.py build/image-rehearsal

clean: ## Remove what the commands above made, but not .venv nor your runs
	rm -rf demo build dist .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
