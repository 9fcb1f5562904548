#!/usr/bin/env bash
# Unpacks PostgreSQL 13 from Debian 11, the last one that has it, into the directory that is the first argument. Needs a
# Debian machine: its own package sources say where Debian is, its own keyring proves what comes from there.
set -euo pipefail

home="$1"
version=13.23
if [ -x "$home/bin/initdb" ] && [ "$(cat "$home/.version" 2>/dev/null)" = "$version" ]; then exit 0; fi

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
sites="$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | sort -u)"
main="$(grep -m1 '/debian/$' <<<"$sites" || true)"
security="$(grep -m1 '/debian-security/$' <<<"$sites" || true)"
if [ -z "$main" ] || [ -z "$security" ] || [ ! -e "$keyring" ]; then
    echo "SKIPPED: PostgreSQL 13 is installed on Debian only; its tests do not run here" >&2
    exit 0
fi

echo "installing PostgreSQL $version"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
chmod a+rx "$work"
mkdir -p "$work"/etc/{apt.conf.d,preferences.d} "$work"/state/lists/partial "$work"/cache/archives/partial "$work/debs"
touch "$work/state/status"
# The security archive of an old release says that it has expired; its signature and sums still hold.
cat > "$work/apt.conf" <<CONF
Dir::Etc "$work/etc";
Dir::State "$work/state";
Dir::State::status "$work/state/status";
Dir::Cache "$work/cache";
Acquire::Check-Valid-Until "false";
APT::Sandbox::User "root";
CONF
cat > "$work/etc/sources.list" <<SOURCES
deb [signed-by=$keyring] $main bullseye main
deb [signed-by=$keyring] $security bullseye-security main
SOURCES
export APT_CONFIG="$work/apt.conf"
apt-get update -qq
(cd "$work/debs" && apt-get download -qq postgresql-13 postgresql-client-13 libpq5 libldap-2.4-2 libssl1.1 libicu67)

rm -rf "$home" "$home.new"
mkdir -p "$home.new"
for package in "$work"/debs/*.deb; do dpkg -x "$package" "$home.new"; done
lib="$home.new/usr/lib/postgresql/13/lib"
# Beside the server's own modules, where the tests' LD_LIBRARY_PATH points; JIT would need LLVM 11.
find "$home.new/usr/lib" -maxdepth 2 -name '*.so*' -exec mv -t "$lib" {} +
rm -f "$lib/llvmjit.so"
ln -s usr/lib/postgresql/13/bin "$home.new/bin"
echo "$version" > "$home.new/.version"
chmod -R a+rX "$home.new"
mv "$home.new" "$home"
