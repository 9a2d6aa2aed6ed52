# The commands of the project; `make` shows them.

C_FILES := $(wildcard picogpt/kernels/csrc/*.[ch] benchmarks/*.c tests/native/*.[ch])

.PHONY: help check test bench measure

help:
	@echo "make check   ruff, mypy and clang-format: lint, format, types"
	@echo "make test    pytest, without the tests marked slow or timing"
	@echo "make bench   training and generation against plain baselines, on a quiet machine"
	@echo "make measure all speeds of a quiet machine, written to docs/measurements"

check:
	ruff check .
	ruff format --check .
	mypy
	@if command -v clang-format >/dev/null; then \
		echo clang-format --dry-run --Werror $(C_FILES); \
		clang-format --dry-run --Werror $(C_FILES); \
	else \
		echo "clang-format is not installed: the format of the C files was not checked"; \
	fi

test:
	pytest

bench:
	python scripts/benchmark.py train
	python scripts/benchmark.py generate

measure:
	python scripts/benchmark.py measure docs/measurements/$$(date +%Y-%m-%d)-all-figures.md
