#!/usr/bin/env bash
# A walk through loratools on a small real adapter: `make demo`, or with loratools installed `bash examples/demo.sh`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

adapter=examples/smollm2-en-r32
squeezed=build/demo-r8

run() {
    echo "\$ $*"
    "$@"
}

heading() {
    printf '\n== %s\n' "$1"
}

mkdir -p build

heading "What is in the file? (from the header alone)"
run loratools info "$adapter"

heading "How much of its rank does it use?"
run loratools inspect "$adapter"

heading "Squeeze it to rank 8"
run loratools squeeze "$adapter" --rank 8 -o "$squeezed" --force

heading "How far is the result from the original?"
run loratools diff "$adapter" "$squeezed"
