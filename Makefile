# The habits of this project; every target sets up what it needs. Works with GNU make 3.81 (macOS) and later.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
BITS ?= 4
DEMO_MODEL = build/tiny-4bit

.PHONY: setup demo test check convert bench tiny golden format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,check]"
	touch $@

$(DEMO_MODEL)/config.json: $(VENV)/.installed examples/tiny/model.safetensors
	$(BIN)/python -m lfm_mlx.convert --model examples/tiny --out $(DEMO_MODEL) --bits 4 --force

demo: $(DEMO_MODEL)/config.json
	$(BIN)/python -m lfm_mlx.generate --model $(DEMO_MODEL) --temp 0 --prompt "What is the capital of France?"
	$(BIN)/python -m lfm_mlx.generate --model $(DEMO_MODEL) --temp 0 --tools examples/weather_tool.json \
		--prompt "What's the weather in Paris?"

test: setup
	$(BIN)/python -m pytest -n auto

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_repo.py

convert: setup
	@test -n "$(MODEL)" -a -n "$(OUT)" || \
		{ echo "usage: make convert MODEL=repo-id-or-folder OUT=folder [BITS=4]" >&2; exit 2; }
	$(BIN)/python -m lfm_mlx.convert --model "$(MODEL)" --out "$(OUT)" --bits "$(BITS)"

bench: setup
	$(BIN)/python -m lfm_mlx.bench

tiny: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[oracle]"
	$(BIN)/python examples/tiny/make_tiny.py --out examples/tiny

golden: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[oracle]"
	$(BIN)/python tests/golden/dump_golden.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV)
