# make quickstart   train a small model to use a Python tool, start to finish
# make help         the other targets

PYTHON ?= python3
JOBS ?= 2
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq
PYTEST := .venv/bin/python -m pytest

.PHONY: help quickstart test test-fast test-slow test-pods lint bench bench-long clean

help:
	@echo "make quickstart   install into .venv, then train: cold start and GRPO-RoC on problems made on the spot"
	@echo "make test         every test: the fast ones, then the slow ones, on JOBS=$(JOBS) processes"
	@echo "make test-fast    only the fast ones; up to 25 minutes"
	@echo "make test-slow    only the slow ones; up to forty-five minutes: learning, kill and resume, chips that are not there, the wheel;"
	@echo "                  then the sandbox's, one by one: attacks with processes, chaos, Ray nodes, problem sets, a soak, 45,000 calls"
	@echo "make test-pods    compile the largest recipe for pods; installs compilers (1.4 GB), twenty minutes"
	@echo "make lint         ruff, and the contract which room may import which"
	@echo "make bench        sandbox, sessions, cluster, rollout, one JSON object a line; tens of minutes"
	@echo "make bench-long   soak (ten minutes), learning (an hour and a half), compilations for pods (half an hour), likewise"
	@echo "make clean        remove .venv, caches and build leftovers (runs/ stays)"
	@echo "Another interpreter: make quickstart PYTHON=python3.12"

quickstart: .venv/installed
	@.venv/bin/jaxrl train quickstart

# One after the other, whatever the others came to; fails at the end if any did.
benchmarks = failed=0; for name in $(1); do \
		echo "== benchmarks/$$name.py" >&2; .venv/bin/python benchmarks/$$name.py --json || failed=1; \
	done; exit $$failed

test: test-fast test-slow

test-fast: .venv/installed-test
	$(PYTEST) -n $(JOBS) -m "not slow"

# The sandbox's alone: they count on the machine.
test-slow: .venv/installed-test
	$(PYTEST) -n $(JOBS) --dist worksteal -m slow --ignore=tests/sandbox
	$(PYTEST) -m slow tests/sandbox

# Compiles the largest recipe for pods that are not there; installs the compilers, twice 700 MB.
test-pods: .venv/installed-test
	JAXRL_COMPILE_PODS=1 $(PYTEST) -m slow tests/check

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/lint-imports --no-cache

bench: .venv/installed-test
	@$(call benchmarks,sandbox sessions cluster rollout losses packing kernels)

bench-long: .venv/installed-test
	@$(call benchmarks,soak learning presets preferences staleness scale bundles)

clean:
	rm -rf .venv build dist *.egg-info .cache .pytest_cache .ruff_cache .hypothesis
	find jaxrl kernels configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps are newer than pyproject.toml while nothing has to be installed again.
.venv/installed: pyproject.toml setup.py | .venv/bin/python
	@echo "jaxrl: installing jaxrl and its dependencies into .venv (once; a few minutes on a slow line) ..."
	@$(PIP) install --editable .
	@touch $@
	@echo "jaxrl: installed."

.venv/installed-test: pyproject.toml setup.py | .venv/bin/python
	@echo "jaxrl: installing jaxrl and what its tests need into .venv (once; torch is the large one) ..."
	@$(PIP) install --editable ".[test]"
	@touch .venv/installed $@
	@echo "jaxrl: installed."

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "jaxrl: there is no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "jaxrl: $$($(PYTHON) --version) is too old; jaxrl needs 3.11 or newer. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "jaxrl: $(PYTHON) comes without the venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "jaxrl: creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
