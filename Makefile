# Few targets, each a thin name for a script. `make demo` and `make test` need root and install what they miss.
SHELL := /bin/bash
.PHONY: demo test check fuzz bench image manifests man kernels clean

demo test check fuzz bench image manifests man kernels:
	@scripts/prepare $@
	@scripts/$@ $(ARGS)

clean:
	cargo clean
