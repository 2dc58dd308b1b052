# One door for everything: `make help` lists the targets.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: help venv check test e2e quickstart down crds bench-cpu
help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

venv: $(VENV)/.installed ## make .venv with all that development needs
$(VENV)/.installed: requirements/all.txt pyproject.toml
	@scripts/make-venv.sh $(VENV)
