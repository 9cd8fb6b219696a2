# Small verbs; what is longer than a few lines stands in hack/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/culvert-vpn/culvert/internal/process.version=$(VERSION)

# One way to compile for the program, its tests and all tools: what they share is then compiled once. (For
# "go test -race": CGO_ENABLED=1.)
export CGO_ENABLED ?= 0
export GOFLAGS := $(filter-out -trimpath,$(GOFLAGS)) -trimpath

# Compilers take a fifth less processor time with it, and more memory.
COMPILER_GOGC ?= 400

.PHONY: help
help: ## this list
	@echo "Culvert: a VPN that lives in a Kubernetes cluster. Verbs:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "New here? 'make demo' shows it at work; 'make check' is the loop for changes; docs/development.md has the rest."

.PHONY: setup
setup: ## install the Debian packages that building, tests and the demo need (as root)
	@hack/setup.sh

.PHONY: build
build: ## bin/culvert and, once it exists, bin/culvert-tunnel
	@mkdir -p bin
	GOGC=$(COMPILER_GOGC) CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: generate
generate: ## deep copies and CRDs from the types in api/
	@hack/generate.sh

.PHONY: image
image: ## the container image, without a registry: .cache/image/culvert.tar (UPDATE=1: today's Debian packages)
	@hack/image.sh

.PHONY: check
check: check-generated check-format check-vet check-lint check-vulnerabilities test-unit ## the quick loop: generated files current, format, vet, lint, unit tests

.PHONY: check-generated check-format check-vet check-lint check-vulnerabilities
check-generated:
	@hack/generate.sh --check

check-format:
	@hack/layer.sh "gofmt"
	@files=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
	if [[ -n $$files ]]; then printf '%s\n' "$$files" "not formatted: run gofmt -w on the files above" >&2; exit 1; fi

check-vet:
	@hack/layer.sh "go vet"
	@GOGC=$(COMPILER_GOGC) go vet ./...

check-lint:
	@hack/layer.sh "golangci-lint"
	@$$(hack/tools.sh)/golangci-lint run ./...

check-vulnerabilities:
	@hack/vulnerabilities.sh

# The tests between namespaces wait most of the time. What the clusters' layers need is built meanwhile, where
# it is not there, with the processor time that they leave.
.PHONY: test
test: setup build ## everything: set-up, build, check, then every layer of tests, also after one that failed
	@failed=; layer() { $(MAKE) --no-print-directory $$1 || failed+=" $$1"; }; \
	layer check; \
	chrt --idle 0 $(MAKE) --no-print-directory kubernetes >/dev/null 2>&1 & \
	trap "kill $$! 2>/dev/null || true" EXIT; \
	layer test-netlab; \
	wait; trap - EXIT; \
	for name in kubernetes test-measuring test-cluster test-cilium test-kernel; do layer $$name; done; \
	if [[ -n $$failed ]]; then echo "failed:$$failed" >&2; exit 1; fi
	@hack/layer.sh "all layers passed"

.PHONY: kubernetes
kubernetes: ## the programs of the tests' Kubernetes, Cilium, and helm (once; the first time takes some minutes)
	@hack/layer.sh "Kubernetes, Cilium and helm for the tests"
	@hack/kubernetes.sh >/dev/null
	@hack/cilium.sh >/dev/null
	@hack/helm.sh >/dev/null

.PHONY: test-unit test-netlab test-measuring test-kernel test-cluster test-cilium
test-unit: ## unit and golden tests: no root, no network
	@hack/test.sh unit

test-netlab: ## real traffic between network namespaces, with real peers (root)
	@hack/test.sh netlab

test-measuring: ## those of them that measure, or hold the processor to times, one at a time (root)
	@hack/test.sh measuring

test-kernel: ## kernel WireGuard, ESP and nftables of Debian's stock kernel, in a virtual machine (root)
	@hack/test.sh kernel

test-cluster: ## a real Kubernetes cluster of two nodes, with Culvert in it (root)
	@hack/test.sh cluster

test-cilium: ## the same with a real Cilium, in every way to route packets and services (root)
	@hack/test.sh cilium

.PHONY: cluster-up cluster-down
cluster-up: setup ## a real Kubernetes cluster of two nodes on this machine (root); NAME=, CNI=cilium, ARGS="-two-subnets"
	@go run ./hack/cluster up $(if $(NAME),-name $(NAME)) $(if $(CNI),-cni $(CNI)) $(ARGS)

cluster-down: ## remove it; NAME=
	@go run ./hack/cluster down $(if $(NAME),-name $(NAME)) $(ARGS)

.PHONY: speed
speed: setup ## the goals for speed, against peers in the same run (root, a machine that does nothing else)
	@CULVERT_GOALS=1 go test ./test/netlab ./test/encryption ./internal/relay ./internal/reverse/front ./test/reverse -run '^(TestScaleSpeed|TestScaleAdd|TestSpeed|TestOneMoreNode|TestOneStream.*|TestConnectLatency|TestStreamSpeed|TestStalled.*)$$' -p 1 -count=1 -v

.PHONY: bench
bench: setup ## side by side with peers, which it builds itself (root); ONLY=tunnels,reverse ROUNDS=5
	@ONLY='$(ONLY)' ROUNDS='$(ROUNDS)' hack/bench.sh

.PHONY: demo demo-down
demo: setup build ## the main job in network namespaces; KEEP=1 leaves it up
	@bin/culvert demo $(if $(KEEP),--keep)

demo-down: ## remove a demo that was kept
	@bin/culvert demo down

.PHONY: clean clean-cache
clean: ## remove what was built in this checkout
	rm -rf bin .cache

clean-cache: ## remove what all checkouts share: Kubernetes, Cilium, helm, tools, kernel, Debian's packages
	@hack/cache.sh clean
