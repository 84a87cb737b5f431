# `make` lists what there is to make.

CARGO ?= cargo
# Warnings are for reading while one writes; here they fail.
export RUSTDOCFLAGS = -D warnings
# Checks pages for people who can't see them well. Its licence is MPL-2.0; it is used by tests and never shipped.
AXE = target/tools/axe

# Checks alert rules and metrics. Of Debian's package only this program is taken: no server is installed.
PROMTOOL = target/tools/prometheus

.PHONY: help test tools postgresql browser promtool systemd fmt clippy unit doc docs deny bench micro growth validate deb trydeb demo

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: tools fmt clippy unit doc deny ## Everything that must hold before a commit

tools: ## Install what the checks need, if it is missing
	@command -v $(CARGO) >/dev/null || { echo "Rust is missing: see https://rustup.rs, then run make again" >&2; exit 1; }
	@$(CARGO) fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@$(CARGO) clippy --version >/dev/null 2>&1 || rustup component add clippy
	@command -v python3 >/dev/null || { echo "python3 is missing (tests read exports with it): apt-get install python3" >&2; exit 1; }
	@[ -n "$$TEST_POSTGRES_URL" ] || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || $(MAKE) --no-print-directory postgresql
	@command -v psql >/dev/null && command -v pg_dump >/dev/null || $(MAKE) --no-print-directory postgresql
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || $(MAKE) --no-print-directory browser
	@[ -e $(AXE)/node_modules/axe-core/axe.min.js ] || { command -v npm >/dev/null || { echo "npm is missing (the tests of the admin page check with axe-core whether everybody can use it): apt-get install npm" >&2; exit 1; }; \
	 npm install --silent --no-audit --no-fund --prefix $(AXE) axe-core@4.14.1; }
	@command -v promtool >/dev/null || [ -x $(PROMTOOL)/usr/bin/promtool ] || $(MAKE) --no-print-directory promtool
	@command -v systemd-analyze >/dev/null && command -v systemd-sysusers >/dev/null && command -v systemd-tmpfiles >/dev/null || $(MAKE) --no-print-directory systemd
	@command -v cc >/dev/null || { echo "a C compiler is missing (SQLite and ring are built with it): apt-get install gcc libc6-dev" >&2; exit 1; }

# The tests start servers of their own; the package shall not start one beside them.
postgresql: # Debian's server programs, for the tests
	@command -v apt-get >/dev/null || { echo "PostgreSQL's server programs (initdb, pg_ctl) are missing: install them, or set TEST_POSTGRES_URL" >&2; exit 1; }
	@echo "installing PostgreSQL's server programs for the tests"
	@sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	 $$sudo mkdir -p /etc/postgresql-common && \
	 { [ -e /etc/postgresql-common/createcluster.conf ] || echo "create_main_cluster = false" | $$sudo tee /etc/postgresql-common/createcluster.conf >/dev/null; } && \
	 { $$sudo apt-get install -y --no-install-recommends postgresql || { $$sudo apt-get update && $$sudo apt-get install -y --no-install-recommends postgresql; }; }

browser: # Debian's browser and its driver, for the tests of the admin page
	@command -v apt-get >/dev/null || { echo "chromium and chromedriver are missing: the tests of the admin page need them" >&2; exit 1; }
	@echo "installing Chromium for the tests of the admin page"
	@sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	 $$sudo apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core || { $$sudo apt-get update && $$sudo apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core; }

promtool: # The checker of alert rules, out of Debian's package
	@command -v apt-get >/dev/null || { echo "promtool is missing (Prometheus' checker of alert rules): install it" >&2; exit 1; }
	@echo "fetching promtool for the tests of deploy/prometheus"
	@mkdir -p $(PROMTOOL) && cd $(PROMTOOL) && rm -f prometheus_*.deb && \
	 { apt-get download prometheus || { sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; $$sudo apt-get update && apt-get download prometheus; }; } && \
	 dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && rm -f prometheus_*.deb

systemd: # Its checkers of units, users and folders
	@command -v apt-get >/dev/null || { echo "systemd-analyze, systemd-sysusers and systemd-tmpfiles are missing: the tests of deploy/systemd need them" >&2; exit 1; }
	@echo "installing systemd's checkers for the tests of deploy/systemd"
	@sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	 $$sudo apt-get install -y --no-install-recommends systemd || { $$sudo apt-get update && $$sudo apt-get install -y --no-install-recommends systemd; }

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

unit:
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		echo "$(CARGO) nextest run --locked"; $(CARGO) nextest run --locked; \
	else \
		echo "$(CARGO) test --locked --lib --bins --tests"; $(CARGO) test --locked --lib --bins --tests; \
	fi
	$(CARGO) test --locked --doc
	$(CARGO) test --locked --bench micro

doc:
	$(CARGO) doc --locked --no-deps --document-private-items

docs: ## Write the documents anew that are made of the code and the migrations
	UPDATE_DOCUMENTS=1 $(CARGO) test --locked --test documents -- --quiet

deny: ## Licences, bans and sources of what we depend on
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --locked --offline check licenses bans sources; \
	else \
		echo "cargo-deny is not installed: licences and sources of dependencies were NOT checked (cargo install --locked cargo-deny)"; \
	fi

# PostgreSQL is that of BENCH_POSTGRES_URL, or one of the benchmark's own.
bench: ## What this machine can do, on SQLite and on PostgreSQL: about half an hour
	UCWA_RELAY_COMMIT=$$(git rev-parse --short=12 HEAD 2>/dev/null) $(CARGO) build --locked --release
	benches/with-postgres sh -c '"$$0" bench $${BENCH_POSTGRES_URL:+--postgres "$$BENCH_POSTGRES_URL"}' target/release/ucwa-relay

micro: ## The parts that every message goes through, each alone
	$(CARGO) bench --locked --bench micro

# What docs/scaling.md shows: MESSAGES=10000000 takes hours and tens of gigabytes in FOLDER.
growth: ## How the archive behaves as it grows (MESSAGES, ACCOUNTS, FOLDER)
	$(CARGO) bench --locked --bench growth -- --messages $(or $(MESSAGES),1000000) --accounts $(or $(ACCOUNTS),1000) --sample 20000 --folder $(or $(FOLDER),/var/tmp)

# Schemas of compose files and of Kubernetes from PyPI, a linter from npm. The image itself is not built, but the program is
# checked from what the image copies.
VALIDATORS = target/tools/validators
DOCKERFILE_LINT = target/tools/dockerfilelint

validate: ## Check image, compose file and Kubernetes manifests, without any of them
	@[ -x $(VALIDATORS)/bin/check-jsonschema ] && [ -x $(VALIDATORS)/bin/kubernetes-validate ] || { \
	 python3 -m venv $(VALIDATORS) && $(VALIDATORS)/bin/pip install --quiet check-jsonschema==0.39.0 kubernetes-validate==1.37.0; }
	$(VALIDATORS)/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/docker/compose.yaml
	$(VALIDATORS)/bin/kubernetes-validate --strict deploy/kubernetes/ucwa-relay.yaml
	@[ -x $(DOCKERFILE_LINT)/node_modules/.bin/dockerfilelint ] || npm install --silent --no-audit --no-fund --prefix $(DOCKERFILE_LINT) dockerfilelint@1.8.0
	$(DOCKERFILE_LINT)/node_modules/.bin/dockerfilelint deploy/docker/Dockerfile
	rm -rf target/image && mkdir -p target/image
	@awk '$$1 == "COPY" && $$2 !~ /^--/ { for (i = 2; i < NF; i++) print $$i }' deploy/docker/Dockerfile | xargs cp -r --target-directory target/image
	$(CARGO) check --locked --manifest-path target/image/Cargo.toml --target-dir target
	rm -rf target/image

# PROFILE=dev packages what has just been built, for trying the package and not for shipping.
PROFILE = dist
BUILT = target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/ucwa-relay
PACKAGE = target/package

deb: ## A Debian package of this machine's architecture (PROFILE, MAINTAINER)
	@$(CARGO) deb --version >/dev/null 2>&1 || { echo "cargo-deb is missing: cargo install --locked cargo-deb" >&2; exit 1; }
	$(CARGO) build --locked --profile $(PROFILE)
	@rm -rf $(PACKAGE) && mkdir -p $(PACKAGE)
	$(BUILT) completions bash > $(PACKAGE)/ucwa-relay.bash
	$(BUILT) completions zsh > $(PACKAGE)/_ucwa-relay
	$(BUILT) completions fish > $(PACKAGE)/ucwa-relay.fish
	$(BUILT) man --out $(PACKAGE)/man
	$(CARGO) deb --locked --no-build --profile $(PROFILE) --deb-revision $(or $(REVISION),1) $(if $(MAINTAINER),--maintainer "$(MAINTAINER)")

# Needs root, mmdebstrap and systemd-container (Debian), and a mirror: no part of make test.
trydeb: ## Install, start, upgrade, remove and purge the package in a Debian of its own (PROFILE)
	$(MAKE) --no-print-directory deb REVISION=1
	rm -rf target/trydeb && mkdir -p target/trydeb && mv target/debian/*-1_*.deb target/trydeb/
	$(MAKE) --no-print-directory deb REVISION=2
	deploy/debian/try target/trydeb/*-1_*.deb target/debian/*-2_*.deb

demo: ## See it work: simulator, relay and lively traffic on loopback
	$(CARGO) run --locked --release -- demo
