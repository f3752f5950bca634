# `make train` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Further flags for training/train.py: make train TRAIN_FLAGS="--max_steps 50"
TRAIN_FLAGS ?=
# Python compiles what it imports, once; compiling all of torch and transformers first takes pip longer.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: train test lint format canary oldest clean

train: $(VENV)/.installed
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py $(TRAIN_FLAGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The parity tests with the newest release of every library, whatever the upper bounds of setup.cfg (canary), and with the
# lower bounds of setup.cfg (oldest). torch keeps the version of constraints.txt in both: newer builds pull gigabytes of
# CUDA packages, and not every index has a CPU build of the oldest. What has the right version already is taken from .venv.
canary: BOUNDS := s/,.*//
oldest: BOUNDS := s/,.*//; s/>=/==/
canary oldest: $(VENV)/.installed-test
	$(BIN)/python -m venv --without-pip .venv-$@
	for environment in $(VENV) .venv-$@; do \
		$$environment/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; \
	done | { read base; read own; echo "$$base" > "$$own/base.pth"; }
	sed -En '/^    [A-Za-z_-]+>=/{ s/ +//; $(BOUNDS); p; }' setup.cfg \
		| grep -Ev '^(torch|lm_eval|mypy|ruff|tensorboard|wandb|gradio|selenium)[>=]' > .venv-$@/requirements.txt
	grep '^torch==' constraints.txt >> .venv-$@/requirements.txt
	$(BIN)/python -m pip --python .venv-$@ install --quiet --no-compile --retries 1 \
		--upgrade --upgrade-strategy eager --requirement .venv-$@/requirements.txt
	$(BIN)/python -m pip --python .venv-$@ list | grep -E '^(torch|transformers|accelerate|huggingface_hub|peft|tokenizers|safetensors|gguf) '
	.venv-$@/bin/python -m pytest -n auto --dist loadfile -m "parity and not network and not gpu and not slow" \
		$$(grep -rl 'pytest.mark.parity' --include '*.py' tests)

# Separate stamp, so that an interrupted environment is rebuilt.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error: Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made setup.cfg setup.py pyproject.toml constraints.txt
	$(PIP_INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[test,harness]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-canary .venv-oldest build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
