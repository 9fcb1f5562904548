#!/usr/bin/env bash
# `cargo test` with the given arguments, then its ten slowest tests with their seconds. Runs all tests although one
# fails. The times of libtest are unstable: only the test programs get RUSTC_BOOTSTRAP, not the compiler, and each
# writes its times to a file of its own, because a server that a test leaves behind would keep a pipe open.
set -euo pipefail

times="$(mktemp -d)"
trap 'rm -rf "$times"' EXIT
cat >"$times/run" <<END
#!/usr/bin/env bash
# A documentation test is no program of libtest.
case "\$1" in */deps/*) ;; *) exec "\$@" ;; esac
RUSTC_BOOTSTRAP=1 exec "\$@" -Z unstable-options --report-time "--logfile=$times/\$\$.log"
END

code=0
"${CARGO:-cargo}" test --no-fail-fast --config "target.'cfg(all())'.runner=['bash', '$times/run']" "$@" || code=$?
echo "The slowest tests, in seconds:"
cat "$times"/*.log 2>/dev/null | sed -nE 's/^[a-z]+ (.*) <([0-9.]+)s>$/\2 \1/p' | sort -rn | head || true
exit "$code"
