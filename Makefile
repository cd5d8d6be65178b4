PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
WORKERS ?= 2
# Python compiles a module when it is first imported. To compile all of them takes half of the installation's time.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
INSTALL := $(BIN)/python $(PIP)

.PHONY: demo test test-long lint zoo zoo-optimum models-check frameworks-check frameworks-long growth-quick growth gpu-check fuzz fuzz-quick faults docs docs-site clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(INSTALL) -c $(CONSTRAINTS) -e '.[test]'
	@touch $@ $(VENV)/.package

# torch comes first and alone, at the pinned version: whatever needs it must find it there.
$(VENV)/.models: $(VENV)/.test
	$(INSTALL) torch==2.13.0
	$(INSTALL) -c $(CONSTRAINTS) -r models/requirements.txt
# Alone: it asks for onnxruntime, whose files are those of onnxruntime-gpu.
	$(INSTALL) --no-deps onnxruntime-genai==0.18.0
	@touch $@

$(VENV)/.frameworks: $(VENV)/.test
	$(INSTALL) torch==2.13.0
	$(INSTALL) -c $(CONSTRAINTS) -e '.[test,examples]'
	@touch $@

demo: $(VENV)/.package  ## install the package alone, grow the committed model, show that it is equal
	$(BIN)/python models/demo.py

test: lint  ## check the style and the types, run the quick tests
	$(BIN)/python -m pytest -n $(WORKERS)

test-long: $(VENV)/.test  ## what `make test` leaves out: most growths of the zoo, and its goldens
	$(BIN)/python -m pytest -n $(WORKERS) -m 'slow and not frameworks and not models'

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

zoo: $(VENV)/.models  ## export the zoo's graphs afresh and say what changed
	$(BIN)/python models/zoo.py
	$(BIN)/python models/zoo_built.py
	$(BIN)/python models/zoo_fused.py

# optimum's exporter needs an older transformers, hence an environment of its own.
$(VENV)-optimum/.done: models/requirements-optimum.txt
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/python $(PIP) torch==2.13.0
	$(VENV)-optimum/bin/python $(PIP) -r models/requirements-optimum.txt
	@touch $@

zoo-optimum: $(VENV)-optimum/.done  ## the same for the graphs of optimum's exporter; `make zoo` then fuses some
	$(VENV)-optimum/bin/python models/zoo_optimum.py

# The runtimes come first: they are small.
models-check: $(VENV)/.models $(VENV)-optimum/.done  ## run grown models in optimum and GenAI, grow real pretrained models
	$(BIN)/python -m pytest -m models -s tests/test_runtimes.py tests/test_models.py

# One thread for each worker: more would wait for each other. XLA compiles each graph for one small run, and most of a
# test's time is its optimisation.
FRAMEWORKS_TESTS = OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n $(WORKERS)

frameworks-check: $(VENV)/.frameworks  ## the handoff to PyTorch and JAX: installs both; TESTS names files to run alone
	$(FRAMEWORKS_TESTS) -m 'frameworks and not slow_frameworks' $(TESTS)

frameworks-long: $(VENV)/.frameworks  ## what frameworks-check leaves out because it takes long
	$(FRAMEWORKS_TESTS) -m slow_frameworks

growth-quick: $(VENV)/.frameworks  ## does a grown model learn sooner? ten minutes; prints tables, writes pictures, checks ratios
	$(BIN)/python benchmarks/growth.py --quick --output out/growth-quick --workers $(WORKERS)

growth: $(VENV)/.frameworks  ## all questions of docs/growth.md: hours
	$(BIN)/python benchmarks/growth.py --full --output out/growth-full --workers $(WORKERS)

gpu-check: $(VENV)/.test  ## the tests that need an NVIDIA GPU
	$(INSTALL) -c $(CONSTRAINTS) -e '.[cuda]'
	$(BIN)/python -m pytest -m gpu

fuzz-quick: $(VENV)/.test  ## a minute of each fuzzer
	$(BIN)/python -m fuzz.mutate --cases 300
	$(INSTALL) atheris
	$(BIN)/python -m fuzz.coverage --minutes 1

fuzz: $(VENV)/.test  ## 10,000 changed graphs, and 15 minutes guided by coverage: an hour
	$(BIN)/python -m fuzz.mutate --cases 10000 --workers $(WORKERS)
	$(INSTALL) atheris
	$(BIN)/python -m fuzz.coverage --minutes 15

faults: $(VENV)/.test  ## strike before every call to the file system, kill at random moments, fill disks
	$(BIN)/python -m fuzz.faults

docs: $(VENV)/.package  ## write the generated pages of docs/
	$(BIN)/python docs/generate.py

# The site reads the package's docstrings and imports nothing, so its environment has only the tools of the extra.
$(VENV)-docs/.done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python $(PIP) -c $(CONSTRAINTS) -r $(VENV)-docs/requirements.txt
	@touch $@

docs-site: $(VENV)-docs/.done  ## build the site into out/site; a warning is an error
	NO_MKDOCS_2_WARNING=true $(VENV)-docs/bin/mkdocs build --strict --quiet
	@echo "out/site/index.html"

clean:
	rm -rf $(VENV) $(VENV)-optimum $(VENV)-docs out
