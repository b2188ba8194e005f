PYTHON ?= python3
VENV := .venv
# CPU threads per process (Accelerate's default is one)
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(VENV)/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
# Additional arguments for `make prune`, such as ARGS="--overwrite_output_dir"
ARGS ?=

.PHONY: help install prune test test-slow test-browser test-faults fresh matrix quality style docs teacher latent-teachers cifar10-teacher benchmark study study-quick clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# --no-compile: Python compiles a module when it is first imported, and most of the installed ones never are
install: $(VENV)/.installed ## create .venv and install the package with its dependencies

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile -e ".[test]"
	touch $@

prune: install ## prune the digits DDPM of this repository (seven to fifteen minutes on two cores), or FAMILY=dit, ldm or text
	$(LAUNCH) training/prune_ddpm.py --recipe digits$(addprefix _,$(FAMILY)) $(ARGS)

test: install ## run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install ## run the tests that take long, and all variants of those that do
	$(VENV)/bin/python -m pytest -m slow

test-browser: $(VENV)/.browser-installed ## open the demo page in headless Chromium (that of CHROMIUM=..., or Playwright's)
	$(VENV)/bin/python -m pytest -m slow -rs tests/demo/test_browser.py

$(VENV)/.browser-installed: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check playwright
	$(if $(CHROMIUM),,$(VENV)/bin/playwright install chromium)
	touch $@

test-faults: install ## kill runs at random times and check that resumed runs end the same (about twelve minutes)
	$(VENV)/bin/python -m pytest -m "slow or not slow" tests/scripts/test_faults.py tests/scripts/test_several_processes.py

fresh: install ## install into an empty environment: time and size, into benchmarks/results/
	$(VENV)/bin/python benchmarks/fresh_install.py --no_cache_dir --write

# Versions of Python and PyTorch, and tests, for `make matrix`
PYTHONS ?= 3.11 3.12 3.13
TORCHES ?= current 2.6.0
MATRIX_TESTS ?= tests/pruning tests/remote tests/families tests/loading tests/test_pruner.py tests/test_pipeline_pruning.py

matrix: install ## run tests of pruned models with each Python of PYTHONS and each PyTorch of TORCHES, in empty environments (an hour)
	$(VENV)/bin/python benchmarks/fresh_install.py --python $(PYTHONS) --torch $(TORCHES) --tests $(MATRIX_TESTS) --write

quality: install ## check style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

style: install ## fix style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.docs-installed ## build the documentation into build/docs/, with warnings as errors (seconds)
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.docs-installed: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

teacher: install ## train the digits DDPM (about half an hour on two cores), into runs/digits-teacher
	$(VENV)/bin/python training/digits/make_digits.py
	$(LAUNCH) training/train_ddpm.py --model_config training/digits/unet_config.json \
		--dataset_name training/digits --max_train_steps 8000 --output_dir runs/digits-teacher

LATENT_TEACHER = OMP_NUM_THREADS=1 $(VENV)/bin/python training/digits/train_latent_teachers.py --resume_from_checkpoint latest

latent-teachers: install ## train the latent digits models (about forty minutes on one core), into runs/digits-*
	$(VENV)/bin/python training/digits/make_captions.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python training/digits/train_autoencoder.py --kind kl --output_dir runs/digits-vae
	OMP_NUM_THREADS=1 $(VENV)/bin/python training/digits/train_autoencoder.py --kind vq --output_dir runs/digits-vqvae
	$(LATENT_TEACHER) --kind dit --autoencoder runs/digits-vae --output_dir runs/digits-dit
	$(LATENT_TEACHER) --kind ldm --autoencoder runs/digits-vqvae --output_dir runs/digits-ldm
	$(LATENT_TEACHER) --kind text --autoencoder runs/digits-vae --output_dir runs/digits-text
	$(VENV)/bin/python training/digits/check_teachers.py --dit runs/digits-dit --ldm runs/digits-ldm --text runs/digits-text \
		--pictures_dir runs/digits-pictures

cifar10-teacher: install ## train the scaled-down CIFAR-10 DDPM of the study (two hours on two cores), into runs/cifar10-teacher
	$(LAUNCH) training/train_ddpm.py --model_config benchmarks/cifar10/unet_config.json \
		--dataset_name uoft-cs/cifar10 --random_flip --train_batch_size 64 --max_train_steps 16000 --learning_rate 5e-4 \
		--validation_images 1024 --output_dir runs/cifar10-teacher --resume_from_checkpoint latest $(ARGS)

benchmark: install ## measure the cost of pruning, checkpoints, tracking and label dropout, into benchmarks/results/
	$(VENV)/bin/python benchmarks/cost.py
	$(VENV)/bin/python benchmarks/overhead.py
	$(VENV)/bin/python benchmarks/label_dropout.py --write

# Additional arguments for `make study`, such as STUDY="--jobs 2 --part main"
STUDY ?=

study: install ## compare pruning methods on digits and CIFAR-10 (a day on two cores; resumable), into benchmarks/results/study/
	$(VENV)/bin/python benchmarks/approximation.py
	$(VENV)/bin/python benchmarks/sensitivity.py --dataset digits
	$(VENV)/bin/python benchmarks/sensitivity.py --dataset cifar10
	$(VENV)/bin/python benchmarks/study.py --dataset digits $(STUDY)
	$(VENV)/bin/python benchmarks/study.py --dataset cifar10 $(STUDY)
	$(VENV)/bin/python benchmarks/study_time.py
	$(VENV)/bin/python benchmarks/study_report.py --write

study-quick: install ## run the study at reduced size (under ten minutes), into runs/study-quick/
	$(VENV)/bin/python benchmarks/study.py --quick --jobs 2
	$(VENV)/bin/python benchmarks/study_time.py --repeats 1 --results runs/study-quick/results --output runs/study-quick/times.json
	$(VENV)/bin/python benchmarks/study_report.py --results runs/study-quick/results --pictures runs/study-quick/pictures \
		--times runs/study-quick/times.json

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
