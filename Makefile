# One profile for everything: RocksDB costs about 28 CPU-minutes to compile, so it is compiled once and kept outside
# of the clone.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/tidemark/target
CARGO := cargo
WORKSPACE := --release --workspace

.PHONY: demo test test-long bench check deny fuzz fmt install-tools

demo: install-tools
	$(CARGO) build $(WORKSPACE)
	$(CARGO_TARGET_DIR)/release/demo

# `cargo test` builds the programs too; building them before it would compile what the tests' features differ in twice.
# One failure does not hide others. The ten slowest tests are printed at the end.
test: install-tools
	bash benches/tools/test.sh $(WORKSPACE) -- --test-threads=2

# Also the ignored tests, and the full counts of the others.
test-long: install-tools
	TIDEMARK_LONG=1 bash benches/tools/test.sh $(WORKSPACE) -- --test-threads=2 --include-ignored

# Ratios beside the peers, in one run; `BENCH_FLAGS='--megabytes 200 --runs 1'` makes it short.
bench: install-tools
	bash benches/tools/install-peers.sh
	$(CARGO) build $(WORKSPACE)
	$(CARGO_TARGET_DIR)/release/catch_up $(BENCH_FLAGS)
	$(CARGO_TARGET_DIR)/release/commit_latency
	$(CARGO_TARGET_DIR)/release/archive_commands

check:
	$(CARGO) fmt --all --check
	bash benches/tools/words.sh
	$(CARGO) clippy $(WORKSPACE) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(WORKSPACE) --no-deps

# Licences, banned crates and sources of every dependency.
deny:
	$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked --quiet cargo-deny
	$(CARGO) deny check licenses bans sources

# Every parser of wal-format for FUZZ_SECONDS (60) each.
fuzz: install-tools
	bash wal-format/fuzz/run.sh

fmt:
	$(CARGO) fmt --all

install-tools:
	bash benches/tools/install.sh
