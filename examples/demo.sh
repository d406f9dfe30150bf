#!/usr/bin/env bash
# A walk through loratools on a small real adapter: `make demo`, or with loratools installed `bash examples/demo.sh`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

adapter=examples/smollm2-en-r8
squeezed=build/demo-r4

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

heading "Squeeze it to rank 4"
run loratools squeeze "$adapter" --rank 4 -o "$squeezed" --force

heading "How far is the result from the original?"
run loratools diff "$adapter" "$squeezed" || [ $? -eq 1 ] # 1: they differ, as they should

heading "The same bytes, better spent: a budget over all targets instead of one rank"
run loratools squeeze "$adapter" --budget 2.5MB -o build/demo-2.5MB --force
