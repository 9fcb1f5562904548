#!/usr/bin/env bash
# Unpacks moto, a mock of AWS in Python, into the directory that is the first argument: a second S3 server, with other habits
# than SeaweedFS's. Its packages are those of moto.txt and no others; nothing else on the machine sees them.
set -euo pipefail

home="$1"
lock="$(dirname "$0")/moto.txt"
python="$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
version="$(sha256sum "$lock" | cut -d ' ' -f 1) $python"
if [ "$(cat "$home/.version" 2>/dev/null)" = "$version" ]; then exit 0; fi
case "$(uname -m) $python" in
    "x86_64 3.11" | "x86_64 3.12" | "x86_64 3.13") ;;
    *)
        echo "SKIPPED: moto is pinned for Python 3.11 to 3.13 on x86_64; its tests do not run here" >&2
        exit 0
        ;;
esac

echo "installing $(grep -o '^moto==[0-9.]*' "$lock")"
rm -rf "$home" "$home.new"
python3 -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
    --require-hashes --target "$home.new" -r "$lock"
echo "$version" > "$home.new/.version"
chmod -R a+rX "$home.new"
mv "$home.new" "$home"
