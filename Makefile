# FinCoach. `make help` lists everything; the two commands that matter are `make retrain` and `make test`.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
SOURCE  ?= population
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
export PYTHONUTF8 = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export JUPYTER_PLATFORM_DIRS = 1

.DEFAULT_GOAL := help
.PHONY: help retrain test coach serve lab docs check fix export hooks bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

retrain: $(READY) ## learn segments and advice, end to end (SOURCE=population | complete-journey | database URL | file.csv)
	@$(BIN)/fincoach retrain --source '$(SOURCE)' $(if $(MAPPING),--mapping '$(MAPPING)')

test: $(READY) ## check style, then run every notebook and every test
	@$(BIN)/ruff check .
	@$(BIN)/pytest

coach: $(READY) ## your own bank statements as a page to keep (STATEMENTS=file or folder)
	@$(BIN)/fincoach coach $(if $(STATEMENTS),'$(STATEMENTS)',$(error say which: make coach STATEMENTS=path/to/statements))

serve: $(READY) ## the API and a page about one person, on what `make retrain` left
	@$(BIN)/fincoach serve --today newest

lab: $(READY) ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/tutorials/01_transactions_to_segments.ipynb

docs: $(READY) ## build the documentation site into site/
	@rm -rf build/docs && mkdir -p build && cp -r docs build/docs && cp -r nbs build/docs/nbs
	@$(BIN)/fincoach db schema --folder build/docs > /dev/null
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "open site/nbs/index.html"

export: $(READY) ## write fincoach/ and README.md from the notebooks
	@$(BIN)/python tools/export.py

check: test docs ## everything CI checks, and the documentation

fix: $(READY) ## repair style where ruff can, clean notebooks, export
	@$(BIN)/nbdev-clean && $(BIN)/python tools/export.py && $(BIN)/ruff check --fix --quiet .

hooks: $(READY) ## install nbdev's git and Jupyter hooks (edits ~/.jupyter)
	@$(BIN)/nbdev-install-hooks

bench: $(READY) ## run the benchmarks (minutes; see benchmarks/)
	@for b in benchmarks/*/run.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean: ## remove the environment and everything generated
	rm -rf $(VENV) var artifacts reports site build *.egg-info

$(READY): setup.py constraints.txt
	@echo "setting up $(VENV) (once, a few minutes) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FinCoach needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lab,statements,dev,complete-journey]'
	@$(BIN)/fincoach warm
	@touch $(READY)
