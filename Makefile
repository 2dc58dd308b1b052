# One door for everything: `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
PYTHON := $(VENV)/bin/python
CACHE := $(or $(GANTLINE_CACHE),$(HOME)/.cache/gantline)
DEVCLUSTER := $(PYTHON) -m gantline_devcluster
KUBECONFIG_GIVEN := $(if $(findstring command line,$(origin KUBECONFIG)),$(KUBECONFIG))

.DEFAULT_GOAL := help
.PHONY: help venv cluster-binaries check unit test test-oldest test-keda dashboards e2e quickstart rehearsal down crds docs kernels bench-cpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(VENV)/.installed ## make .venv/ with all that development needs
$(VENV)/.installed: requirements/all.txt requirements/tools.txt pyproject.toml scripts/make-venv.sh
	@scripts/make-venv.sh $(VENV)

cluster-binaries: venv ## build Kubernetes and its parts into the cache (once for each version)
	@$(DEVCLUSTER) build --set suite

# What mypy knows of files that have not changed outlives the tree; as files, since trees may be checked at once.
check: venv ## lint, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --no-sqlite-cache --cache-dir "$(CACHE)/mypy"
	$(VENV)/bin/lint-imports

unit: venv ## the tests that need neither API server nor node
	$(VENV)/bin/pytest -q -m "not apiserver and not node and not gpu" tests

test: venv cluster-binaries kernels ## the whole suite; what CI runs
	@$(PYTHON) scripts/run_tests.py

test-oldest: venv ## the tests that talk to an API server, on the oldest Kubernetes that upstream supports (built once, minutes)
	@$(DEVCLUSTER) build --set oldest
	GANTLINE_KUBERNETES=oldest $(VENV)/bin/pytest -q -m "apiserver and not node and not gpu" tests/operator

# A network of its own, in which nothing but the tests can reach KEDA's ports: one of them listens on all addresses.
test-keda: venv ## the tests beside the real KEDA (built once, minutes; root, or a user who may make namespaces)
	@$(DEVCLUSTER) build --set keda
	GANTLINE_KEDA=1 unshare --net $(if $(filter 0,$(shell id -u)),,--map-root-user) -- sh -c 'ip link set lo up && exec "$$0" "$$@"' \
	  $(VENV)/bin/pytest -q tests/operator/test_keda.py

dashboards: venv cluster-binaries ## draw the Grafana dashboards over a real Prometheus with Grafana's components in a browser (root, network, minutes)
	@scripts/browser.sh
	GANTLINE_DASHBOARDS=1 $(VENV)/bin/pytest -q tests/operator/test_boards_drawn.py
	@echo "Look at build/dashboards/*.png"

e2e: venv cluster-binaries ## from `kubectl apply` to streamed tokens, on the one-node cluster
	$(VENV)/bin/pytest -q tests/e2e

quickstart: venv ## everything, once: cluster, chart, example, a streamed answer (KUBECONFIG=... IMAGE_REPOSITORY=... for another cluster)
	@$(PYTHON) scripts/quickstart.py $(if $(KUBECONFIG_GIVEN),--kubeconfig "$(KUBECONFIG_GIVEN)") $(if $(IMAGE_REPOSITORY),--image-repository "$(IMAGE_REPOSITORY)")

rehearsal: venv ## the quickstart's path on a cluster of its own with images built from the Dockerfile, end to end (root, minutes, 15 GB)
	@$(PYTHON) -m scripts.rehearsal

down: ## remove the quickstart's cluster and everything that belongs to it
	@if [ -x $(PYTHON) ]; then $(DEVCLUSTER) down; else echo "gantline: nothing to remove: there is no $(VENV)"; fi

crds: venv ## generate the CustomResourceDefinitions and the documents made from code
	$(PYTHON) -m gantline_operator.crd
	$(PYTHON) scripts/server_docs.py
	$(PYTHON) scripts/module_lines.py

kernels: venv ## compile the CUDA kernels into the cache (the compiler comes from PyPI, once)
	$(PYTHON) -m gantline_kernels.build --fetch

bench-cpu: venv ## the engine's own time per step, with a model that costs nothing
	$(PYTHON) -m benchmarks.host_step

clean: down ## remove what the tree has grown, but not the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .quickstart build
