#!/usr/bin/env bash
# Refuses words and lines that are hard to read: the patterns below in Rust code, lines over 100 characters in comments,
# and lines over 120 in documents. Prints each place; exits 1 if there is one.
set -euo pipefail
cd "$(dirname "$0")/../.."

found=0
# $1 reason, $2 pattern (extended), the rest: files.
refuse() {
    local reason="$1" pattern="$2"
    shift 2
    if grep -nE -- "$pattern" "$@"; then
        echo "words.sh: $reason" >&2
        found=1
    fi
}

mapfile -t code < <(git ls-files '*.rs')
mapfile -t documents < <(git ls-files '*.md')
refuse 'write "cannot"' '\b[Cc]an not\b' "${code[@]}" "${documents[@]}"
refuse 'write "again", "rewrite" or "from scratch"' '\b[Aa]new\b' "${code[@]}" "${documents[@]}"
refuse 'name who logs, reports or sends' '//.*\b(is|are) (told|said|asked)\b' "${code[@]}"
refuse 'write "next to", "together with" or "except"' '//.*\b(beside|but for|came of|hears)\b' "${code[@]}"
refuse 'begin with a noun phrase or a verb: "Returns true if ..."' \
    '//[/!] (What|Whether|Where|How|Who) ' "${code[@]}"
refuse 'a line of a document is at most 120 characters wide' '^[^|]{121,}$' "${documents[@]}"
# The width includes the indentation, in characters.
export LC_ALL=C.UTF-8
if grep -nP '^(?= *//).{101,}$' "${code[@]}"; then
    echo "words.sh: a comment is at most 100 characters wide" >&2
    found=1
fi
exit "$found"
