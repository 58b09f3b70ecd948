# make help lists what there is.

DRIVERS := softhsm luna
BIN     := bin/kmsd $(addprefix bin/kmsd-driver-,$(DRIVERS))
GO      := go
FLAGS   := -trimpath

.PHONY: help build demo mariadb-demo test modules lint unit e2e chaos shake rekey resync restore-drill fuzz bench proto deps deps-mariadb clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## kmsd and its drivers, in bin/
	CGO_ENABLED=0 $(GO) build $(FLAGS) -o bin/kmsd ./cmd/kmsd
	CGO_ENABLED=1 $(GO) build $(FLAGS) -o bin/ $(addprefix ./plugins/,$(DRIVERS))
	@for d in $(DRIVERS); do mv -f bin/$$d bin/kmsd-driver-$$d; done

demo: deps build ## three tokens, a failover, a re-key: what survived, in numbers
	CGO_ENABLED=0 $(GO) build $(FLAGS) -o bin/tde-demo ./examples/tde/demo
	bin/tde-demo --bin bin

mariadb-demo: deps deps-mariadb build ## an unmodified MariaDB whose keys are in the HSMs, which fail
	CGO_ENABLED=0 $(GO) build $(FLAGS) -o bin/mariadb-demo ./examples/tde/mariadb
	bin/mariadb-demo --bin bin

test: deps lint unit e2e ## everything that has to pass: lint, race tests, end to end on SoftHSM

modules:
	@.ci/modules

lint: modules ## gofmt, vet, staticcheck
	.ci/lint

unit: deps deps-mariadb modules ## every package with the race detector
	CGO_ENABLED=0 $(GO) build ./cmd/kmsd ./kms ./kms/client
	$(GO) test -race -timeout 30m $$($(GO) list ./... | grep -v '/e2e\(/\|$$\)')

e2e: deps deps-mariadb modules ## real tokens, real processes, real signals
	$(GO) test -count=1 -p 1 -timeout 30m ./e2e/...

# A new seed is drawn unless one is given.
FAULTS  := 300
MEMBERS := 3
DRIVER  := softhsm
KINDS   :=
SEED    := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')

chaos: deps ## random faults under load: DRIVER=luna, FAULTS=300, SEED=N tries a run again, MEMBERS=3, KINDS=kill-driver,drain
	$(GO) test -count=1 -v -timeout 60m ./e2e/chaos -run '^TestChaos$$' -args -driver $(DRIVER) -seed $(SEED) -faults $(FAULTS) -members $(MEMBERS) -kinds '$(KINDS)'

KEYS := 200

restore-drill: deps ## back up, erase two tokens, restore: KEYS=10000
	$(GO) test -count=1 -v -timeout 120m ./e2e -run '^TestRestoreDrill$$' -args -drill-keys $(KEYS)

resync: KEYS := 1000
resync: deps ## KEYS=1000 keys to a Luna member that was away
	$(GO) test -count=1 -v -timeout 60m ./e2e/luna -run '^TestManyKeysReachAMemberThatWasAway$$' -args -keys $(KEYS)

rekey: KEYS := 1000000
rekey: deps ## a rekey of KEYS=1000000 data keys on three tokens, with kmsd killed twice on the way
	$(GO) test -count=1 -v -timeout 60m ./e2e/rekey -args -keys $(KEYS)

ROUNDS := 3

shake: modules ## the tests in rare orders of events, ROUNDS=3 times each with 1, 2 and 4 processors
	.ci/shake $(ROUNDS) ./kms/... ./pluginproto/... ./internal/memdriver ./cmd/...

fuzz: ## ten seconds of every fuzz target
	@$(GO) list -f '{{$$d := .ImportPath}}{{range .TestGoFiles}}{{$$d}} {{end}}{{range .XTestGoFiles}}{{$$d}} {{end}}' ./... | tr ' ' '\n' | sort -u | grep . | while read -r p; do \
	  for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
	    echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime 10s $$p || exit 1; \
	  done; \
	done

bench: ## every benchmark, once
	$(GO) test -run '^$$' -bench . -benchmem $$($(GO) list ./... | grep -v '/e2e\(/\|$$\)')

proto: ## the generated code of the driver contract
	.ci/install protobuf-compiler
	$(GO) generate ./pluginproto/...

deps:
	@.ci/install softhsm2 opensc

deps-mariadb:
	@.ci/install mariadb-server mariadb-plugin-hashicorp-key-management

clean: ## forget what was built
	rm -rf bin
