# `make demo` and `make test` do everything on a fresh machine that has Python (with venv), git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
READY := $(VENV)/.ready
# What tests compare with, in a folder of its own: where Transformers finds it installed, hybrid models run its kernels, which
# break their graphs on a CPU.
PEERS := flash-linear-attention==0.6.0 fla-core==0.6.0
SOURCES := attnres_compile kernels passes patterns

.DEFAULT_GOAL := help
.PHONY: help install demo test coverage lint bench kernels zoo fuzz matrix clean

help:
	@echo "make demo     install into $(VENV) and run examples/demo.py"
	@echo "make test     install into $(VENV) and run the tests"
	@echo "make coverage install into $(VENV) and run the tests, with the lines and branches of passes/ and patterns/ that none reaches"
	@echo "make lint     install into $(VENV) and run ruff and mypy"
	@echo "make bench    install into $(VENV) and run the benchmarks"
	@echo "make kernels  install into $(VENV) and compile every kernel for four GPUs with two Tritons (no GPU needed)"
	@echo "make zoo      install into $(VENV) and check every model of the zoo (about an hour on 2 cores)"
	@echo "make fuzz     install into $(VENV) and check 2,000 random networks (FUZZ_ARGS=\"--networks 100 --seed 3\")"
	@echo "make matrix   run the core tests under torch 2.11 to 2.13 and Python 3.11 and 3.12 (downloads some GB)"
	@echo "make clean    remove $(VENV), build outputs and caches"

install: $(READY)

# torch first and by its exact version, so that no later step of the resolver reaches for another build of it. setuptools
# comes along so that our own build needs no isolated environment.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "attnres-compile needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1); try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(VENV)/peers $(PEERS)
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

# Two tests at a time, of one thread each: most of their time goes into tracing, which is single-threaded Python.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Without the tests that kill processes at random moments: coverage makes those slow to end, and they touch no pass.
coverage: $(READY)
	$(MAKE) test PYTEST_ARGS="--cov --cov-report=term-missing:skip-covered --ignore tests/test_checkpoint_kills.py $(PYTEST_ARGS)"

# mypy names modules after folders and knows no package-dir map, so it gets a folder of links in the shape of the map.
lint: $(READY)
	$(BIN)/ruff check .
	@rm -rf build/typecheck && mkdir -p build/typecheck/attnres_compile
	@cd build/typecheck/attnres_compile && ln -s ../../../attnres_compile/* ../../../kernels ../../../passes ../../../patterns .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

bench: $(READY)
	$(BIN)/python tests/bench/run.py $(BENCH_ARGS)

kernels: $(READY)
	$(BIN)/python tests/bench/offline.py --triton 3.6.0 $(KERNELS_ARGS)

zoo: $(READY)
	$(BIN)/python tests/zoo/run.py $(ZOO_ARGS)

fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --networks 2000 --failures build/fuzz $(FUZZ_ARGS)

matrix: $(READY)
	$(BIN)/python tests/matrix/run.py $(MATRIX_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
