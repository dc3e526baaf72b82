# Every target creates .venv if needed. Requires make and Python >= 3.11.
PYTHON ?= python3
RUN := .venv/bin/
# Pinned versions, without the bytecode of modules that are never imported (190 MB).
INSTALL := $(RUN)pip install --quiet --disable-pip-version-check --no-build-isolation --no-compile -c requirements.lock

.PHONY: install demo test test-slow lint docs docs-serve lock clean

install: .venv/installed  ## create .venv, with what reports need

demo: .venv/installed  ## collect, train, evaluate, ablate and report in about four minutes on two cores
	$(RUN)ringrl demo

test: .venv/ready  ## all tests except the slow ones
	$(RUN)python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Full disks need root or user namespaces.
test-slow: .venv/ready  ## everything marked slow: the other cases of the matrices, kills, full disks, damaged files; 90 minutes
	$$(unshare --user --map-root-user --mount true 2>/dev/null && echo unshare --user --map-root-user --mount) \
		$(RUN)python -m pytest -m slow tests

lint: .venv/ready  ## style and types
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

docs: .venv/docs  ## the site in build/site, with every link checked
	NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs build --strict

docs-serve: .venv/docs  ## the site on http://127.0.0.1:8000, built again after every change
	NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs serve

.venv/docs: .venv/ready
	$(INSTALL) -e '.[docs]'
	touch $@

.venv/ready: .venv/installed
	$(INSTALL) -e '.[dev]'
	touch $@

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "RingRL needs Python >= 3.11; run: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) setuptools
	$(INSTALL) -e '.[report]'
	touch $@

lock:  ## pin every dependency for all supported Pythons (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-annotate --no-header -o requirements.lock

clean:
	rm -rf .venv build dist *.egg-info demo report
