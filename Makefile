# demo · test · check · check-deep · mutants · bench · docs · site: each sets up what it needs, and is quiet when there is nothing to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROOFS := .venv-proofs
FORGE = $(firstword $(wildcard node_modules/@foundry-rs/forge-*/bin/forge) forge)
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check check-deep mutants bench docs site setup compile snapshot clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/swarmchain demo --out demo-report

test: setup
	$(FORGE) test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check swarmchain deploy tests bench docs
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python deploy/compile.py --check
	$(BIN)/python docs/generate_cli.py --check
	$(MKDOCS) --quiet

# what takes too long for every change: see docs/verification.md for what and how long
check-deep: setup $(PROOFS)/.done
	FOUNDRY_PROFILE=deep $(FORGE) test
	SWARMCHAIN_ORACLE_EXAMPLES=24 SWARMCHAIN_ORACLE_STEPS=60 $(BIN)/python -m pytest tests/test_oracle.py
	SWARMCHAIN_FAULTS=all $(BIN)/python -m pytest tests/test_faults.py
	$(BIN)/python tests/proofs.py $(PROOFS)/bin

mutants: setup
	$(BIN)/python tests/mutation.py --every 3 --write

bench: setup
	@for script in $(filter-out bench/tables.py,$(wildcard bench/*.py)); do $(BIN)/python $$script || exit 1; done

docs: setup
	$(BIN)/python docs/generate_cli.py

site: setup
	$(MKDOCS)

compile: setup
	$(BIN)/python deploy/compile.py

snapshot: setup
	$(BIN)/python tests/snapshot.py

setup: $(VENV)/.done node_modules/.done

# torch first and alone: the other packages then take it as it is, and pip does not look for a larger build
$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Error: Python 3.11 or later is needed; name it with make PYTHON=…" >&2; exit 1; }
	@echo "setting up Python packages (minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# apart from the package: these tools pin other versions of what it stands on
$(PROOFS)/.done: Makefile
	@echo "setting up slither and halmos"
	@$(PYTHON) -m venv $(PROOFS)
	@$(PROOFS)/bin/python -m pip install --quiet --disable-pip-version-check slither-analyzer==0.11.6 halmos==0.3.3
	@touch $@

node_modules/.done: package.json package-lock.json
	@command -v npm >/dev/null || { echo "Error: Node.js 20 or later, with npm, is needed" >&2; exit 1; }
	@echo "setting up npm packages"
	@npm ci --no-audit --no-fund --silent
	@touch $@

clean:
	rm -rf $(VENV) $(PROOFS) node_modules build out cache demo-report
