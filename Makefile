# `make` lists what there is to make.

CARGO ?= cargo
# Warnings are for reading while one writes; here they fail.
export RUSTDOCFLAGS = -D warnings
# Checks pages for people who can't see them well. Its licence is MPL-2.0; it is used by tests and never shipped.
AXE = target/tools/axe

.PHONY: help test tools postgresql browser fmt clippy unit doc docs deny bench growth demo

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
bench: ## What this machine can do, on SQLite and on PostgreSQL: about ten minutes
	UCWA_RELAY_COMMIT=$$(git rev-parse --short=12 HEAD 2>/dev/null) $(CARGO) build --locked --release
	benches/with-postgres sh -c '"$$0" bench $${BENCH_POSTGRES_URL:+--postgres "$$BENCH_POSTGRES_URL"}' target/release/ucwa-relay

# What docs/scaling.md shows: MESSAGES=10000000 takes hours and tens of gigabytes in FOLDER.
growth: ## How the archive behaves as it grows (MESSAGES, ACCOUNTS, FOLDER)
	$(CARGO) bench --locked --bench growth -- --messages $(or $(MESSAGES),1000000) --accounts $(or $(ACCOUNTS),1000) --sample 20000 --folder $(or $(FOLDER),/var/tmp)

demo: ## See it work: simulator, relay and lively traffic on loopback
	$(CARGO) run --locked --release -- demo
