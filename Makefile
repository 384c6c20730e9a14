# The developer's interface. Each target does its whole set-up; a second run finds it done. `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin

# Two workers for each of the two cores that CI has: tests wait for half of their time. Those marked with one xdist_group share a
# worker, and so what that worker started.
WORKERS := 4
PYTEST := $(BIN)/pytest -o cache_dir=$(VENV)/tests -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# 3 is a set-up script's word for "not on this machine", after it said what it would have run: then the tests that need it are
# left out, and say so. In CI that is a failure like any other.
where_possible = $(1) || { status=$$?; [ $$status -eq 3 ] && [ "$$CI" != true ] || exit $$status; }

# Tests start Python some thousand times, some of them in an emulated processor: it is to compile nbdcore once, and not each time,
# even where the environment says that no bytecode is to be kept.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-pythons test-here test-vsock lint docs servers vm-parts clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(VENV)/ready ## start a server on every transport that works here, and talk to it through each
	@$(BIN)/nbdcore demo

test: lint servers vm-parts ## check everything, against real servers and in a virtual machine (root on Debian installs them)
	$(PYTEST)
	@$(MAKE) --no-print-directory test-pythons

test-quick: $(VENV)/ready ## run the tests that need nothing but Python
	$(PYTEST) -m "not interop and not vm and not packaging and not typing"

# Each in a virtual environment of its own. A bare Debian has one CPython. Two run at once, each with half of the workers, and print
# what they have to say when they end.
test-pythons: environments servers ## run what depends on the Python under every further CPython from 3.11 on that is here
	@found=$$($(FURTHER)) || exit 1; \
	[ -n "$$found" ] || { echo "No further CPython from 3.11 on is here: nothing to run again."; exit 0; }; \
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going WORKERS=2 $$(printf ' with%s' $$found)

FURTHER = tests/setup/pythons $(BIN)/python
# The path of the Python, in the name of a target.
with/%:
	@$(MAKE) --no-print-directory test-here PYTHON=/$* VENV=.cache/$(notdir $*)

# They need nothing but the tests' group, and have no pip of their own: the first one's serves them.
.PHONY: environments
environments: $(VENV)/made
	@found=$$($(FURTHER)) || exit 1; \
	for python in $$found; do \
		folder=.cache/$${python##*/}; \
		$(MAKE) --no-print-directory $$folder/ready PYTHON=$$python VENV=$$folder GROUPS=test \
			OWN_PIP=without-pip PIP="$(BIN)/python -m pip --python $$folder/bin/python" || exit 1; \
	done

# What depends on the Python: all that reaches the system through its modules, which are sockets, ssl, threads, processes, event
# loops and what is installed. What only counts bytes is the same everywhere, and has a quick sample here. Of a test with many sets
# of parameters one is run: they all were on the first Python. `make test-pythons CHOICE=` runs them all.
DEPENDS := tests/aio tests/clients tests/plugins tests/streams tests/transports tests/server/test_listening.py \
	tests/server/test_tls.py tests/server/test_tls_clients.py tests/libnbd/test_aio.py tests/libnbd/test_connecting.py \
	tests/libnbd/test_exit.py tests/libnbd/test_tls.py tests/security/test_trust.py tests/test_public_names.py
SAMPLE := $(patsubst %,tests/protocol/test_%.py,automatic callbacks commands framing greeting memory requests)
CHOICE := --one-of-each

test-here: $(VENV)/ready
	$(PYTEST) $(CHOICE) $(DEPENDS) $(SAMPLE)

test-vsock: $(VENV)/ready servers vm-parts ## run the tests over a real AF_VSOCK, in a throw-away virtual machine
	$(BIN)/pytest -m vm

# Nothing here is a test: what comes out depends on the machine, and on what else it does. BENCH takes further options, such as
# --only reads; `python -m tests.bench --help` has them all.
.PHONY: bench bench-quick
SAME := .cache/bench/python
bench: $(VENV)/ready $(SAME)/ready bench-peers ## measure nbdcore beside fio, nbdcopy and libnbd's Python module (half an hour; leave the machine alone)
	@$(BIN)/python -m tests.bench --python $(SAME)/bin/python $(BENCH)

bench-quick: $(VENV)/ready $(SAME)/ready bench-peers ## the same in some minutes, and less exact
	@$(BIN)/python -m tests.bench --quick --python $(SAME)/bin/python $(BENCH)

# Debian's own Python, which is what libnbd's module is for: so both sides run on one interpreter.
$(SAME)/ready: pyproject.toml hatch_build.py tests/setup/venv
	@PYTHON=/usr/bin/python3 tests/setup/venv $(SAME)
	@$(SAME)/bin/python -m pip install --quiet --editable '.[numpy,cli]'
	@touch $@

lint: $(VENV)/ready-lint ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: man
man: $(VENV)/ready ## make the manual pages anew, from what the commands say with --help
	$(BIN)/python -m nbdcore.cli.manual man

docs: $(VENV)/ready-docs ## build the documentation site, strictly, into site/
	$(BIN)/mkdocs build --strict

servers:
	@$(call where_possible,tests/setup/servers)

.PHONY: bench-peers
bench-peers: servers
	@$(call where_possible,tests/setup/bench)

# The virtual machine's own programs are among the servers.
vm-parts: servers
	@$(call where_possible,tests/vm/fetch)

clean: ## remove all that make made, the virtual environment and downloads too
	rm -rf $(VENV) .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed changes with pyproject.toml only: the package itself is installed editable. GROUPS has more where more will be
# needed: one pip brings them sooner than three do.
GROUPS := test
PIP = $(BIN)/python -m pip
$(VENV)/made: tests/setup/venv
	@tests/setup/venv $(VENV) $(OWN_PIP)
	@touch $@

$(VENV)/ready: pyproject.toml hatch_build.py $(VENV)/made
	@$(PIP) install --quiet --editable '.[cli]' $(GROUPS:%=--group %)
	@touch $@ $(patsubst %,$(VENV)/ready-%,$(filter-out test,$(GROUPS)))

$(VENV)/ready-lint $(VENV)/ready-docs: $(VENV)/ready
	@{ [ -e $@ ] && [ ! $@ -ot $< ]; } || $(PIP) install --quiet --group $(@:$(VENV)/ready-%=%)
	@touch $@
