# Everything runs in .venv, which the first target that needs it makes.
# Needed: Python 3.11 or later, make, a package index. `make demo PYTHON=python3.12` picks another.

PYTHON ?= python3
JOBS ?= 2
TESTS ?= tests
BASE ?= HEAD^

venv := .venv
python := $(venv)/bin/python
installed := $(venv)/.installed
run_tests := $(python) -m pytest -n $(JOBS) --dist worksteal --slowest 20
# In CI, what failed runs once more, alone: what fails beside others only is printed, and is no end.
once_more := [ $$? -eq 1 ] && [ -n "$$CI" ] \
  && $(python) -m pytest --last-failed --last-failed-no-failures none $(TESTS)

.PHONY: demo help chromium openai-js test test-rest test-all test-nightly test-changed times replay lint docs pages format golden release clean

demo: $(installed)
	$(python) examples/demo.py

help:
	@sed -n 's/^    make /make /p' CONTRIBUTING.md

# A browser for the tests of the page of `moec serve`, which are skipped without one.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null 2>&1 \
	  || echo 'no Chromium, and it cannot be installed here: the tests of the page are skipped'

# OpenAI's client for JavaScript, whose test is skipped without it.
openai-js: $(installed)
	@test -d $(venv)/node/node_modules/openai \
	  || npm install --silent --no-audit --no-fund --prefix $(venv)/node openai@6 >/dev/null 2>&1 \
	  || echo 'no npm, or no registry: the test of the client for JavaScript is skipped'

# Which tests are fast, tests/times.json records.
test: $(installed)
	$(run_tests) --tier fast $(TESTS) || { $(once_more); }

# What `make test` leaves out.
test-rest: $(installed)
	$(run_tests) --tier rest $(TESTS) || { $(once_more); }

test-all: $(installed)
	$(run_tests) --tier all $(TESTS)

# What these cover in short; before a version.
test-nightly: $(installed)
	$(run_tests) --tier nightly $(TESTS)

times: $(installed)
	$(run_tests) --update-times $(TESTS)

# The tests that run code which changed since they last passed here. Tests that read files as text
# are not seen: run all before a commit.
test-changed: $(installed)
	$(python) -m pytest -n $(JOBS) --testmon $(TESTS)

# What passes and kernels the tests make here and at BASE, compared: 1 where any differs.
replay: $(installed)
	$(python) -m tests.replay --base $(BASE) --jobs $(JOBS) $(TESTS)

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy -p moec
	$(venv)/bin/lint-imports

# The pages, into build/site; a broken link, anchor or page that nobody links to is an error.
docs: $(installed)
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

# What is written from tables: docs/ops.md, passes.md, benchmarks/, systems.md, the picture.
pages: $(installed)
	$(python) -m docs.catalogue
	$(python) -m docs.pictures
	$(python) -m benchmarks.render
	$(python) -m docs.systems
	$(python) -m docs.surveys

format: $(installed)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

golden: $(installed)
	$(python) -m pytest --update-golden $(TESTS)

# The wheel and the source distribution, tried in new environments of each Python that is here.
release: $(installed)
	$(python) .ci/release.py $(PYTHONS)

# A venv whose Python has gone (an upgrade, a moved clone) is made anew.
$(installed): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"moec needs Python 3.11 or later; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	@$(python) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(venv)
	@echo 'installing moec and what it needs into $(venv): a minute or two'
	@$(python) -m pip install --quiet --disable-pip-version-check --editable '.[all,dev,docs]'
	@touch $@

clean:
	rm -rf $(venv) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
