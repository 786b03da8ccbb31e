# Few targets, each a thin name for a script. scripts/prepare says which need root; what is missing is installed, by root.
SHELL := /bin/bash
.PHONY: demo test check fuzz bench image manifests man kernels clean

demo test check fuzz bench image manifests man kernels:
	@scripts/prepare $@
	@scripts/$@ $(ARGS)

clean:
	cargo clean
