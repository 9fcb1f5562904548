#!/usr/bin/env bash
# Fuzzes each parser for FUZZ_SECONDS (60) seconds, beginning with pieces of the real files in tests/fixtures. What is found
# lies in fuzz/artifacts/TARGET; `cargo fuzz run TARGET FILE` shows it again.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds="${FUZZ_SECONDS:-60}"
# The coverage flags are unstable ones; the compiler is the project's own all the same.
export RUSTC_BOOTSTRAP=1
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked --quiet cargo-fuzz

seeds="$(mktemp -d)"
trap 'rm -rf "$seeds"' EXIT
mkdir -p "$seeds"/{wal_decoder,sealed,history,backup_label}
# $1 TARGET, $2 name, $3 the bytes in front, as printf takes them; the content comes from standard input.
seed() { { printf "$3"; cat; } >"$seeds/$1/$2"; }
number=0
for major in 13 14 15 16 17 18; do
    files="tests/fixtures/pg$major"
    # Version, cuts, and 0 for WAL.
    zstd -dcq "$files.wal.zst" | head -c 16384 | seed wal_decoder "pg$major" "\\x0$number\\x09\\x00" || true
    seed backup_label "label$major" '\x00' <"$files.backup_label"
    seed backup_label "map$major" '\x01' <"$files.tablespace_map"
    zstd -dcq "$files.backup_manifest.zst" | head -c 4096 | seed backup_label "manifest$major" '\x02' || true
    zstd -dcq "$files.pg_control.zst" | head -c 300 | seed backup_label "control$major" '\x03' || true
    number=$((number + 1))
done
# Records: a commit with xinfo, a checkpoint, a record with a block.
printf '\x01\x80\x0e\x00\xff\x0c\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00' | seed wal_decoder commit '\x05\x09\x01'
{ printf '\x00\x10\x5a\x00\xff\x58'; head -c 88 /dev/zero; } | seed wal_decoder checkpoint '\x05\x09\x01'
printf '\x0a\x00\x19\x00\x00\x20\x02\x00\x7f\x06\x00\x00\x05\x00\x00\x00\x00\x40\x00\x00\x07\x00\x00\x00\xff\x01xxy' |
    seed wal_decoder block '\x05\x09\x01'
{ printf '\x05\x00\x01'; head -c 3000 tests/fixtures/pg18.wal.zst; } | seed sealed made '\x02'
printf '\x03\x03\x02\x04\x06' | seed sealed summary '\x01'
printf '1\t0/3000000\tno recovery target specified\n2\t16/B374D848\tbefore 2026-11-21\n' | seed history two '\x03'

for target in wal_decoder sealed history backup_label; do
    mkdir -p "fuzz/corpus/$target"
    cargo fuzz run --release --sanitizer none "$target" "fuzz/corpus/$target" "$seeds/$target" -- \
        -max_total_time="$seconds" -max_len=32768 -rss_limit_mb=1024 -timeout=10 -print_final_stats=1 -verbosity=0 2>&1 |
        sed '/Recommended dictionary/,/End of recommended dictionary/d'
done
