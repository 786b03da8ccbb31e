# Few targets, each a thin name for a program or a script. `make demo` and `make test` need root and install what they miss.
SHELL := /bin/bash
.PHONY: demo test check bench clean prepare

demo: prepare
	@scripts/demo

test: prepare
	@scripts/test

check: prepare
	@scripts/check

bench: prepare
	@scripts/bench $(ARGS)

prepare:
	@scripts/prepare

clean:
	cargo clean
