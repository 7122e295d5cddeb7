#!/usr/bin/env bash
# What must be known once there is a GPU, in order of priority, within BUDGET seconds:
#
#   OUT=folder BUDGET=480 PYTHON=python3 SOURCE=pairs.jsonl.gz bash benchmarks/device.sh [--tiny]
#
# Every part is a process with a time limit; one that fails or is stopped does not stop the next one. OUT
# (benchmarks/results/device) then holds device.json, memory.json, trl.json, parts.tsv and log.txt. SOURCE: the pairs
# beside TRL, UltraFeedback's if given, else the short built-in ones. --tiny tries on a CPU what a CPU can run.
# device_study.sh runs another SCRIPT's parts by this loop. WHOLE: its BUDGET. RESULTS: the files that it writes anew.
set -uo pipefail
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results/device}")
SCRIPT=${SCRIPT:-device} RESULTS=${RESULTS:-device.json memory.json trl.json}
cd "$(dirname "$0")/.." || exit
slower=1
[ "${1:-}" = --tiny ] && slower=6
BUDGET=${BUDGET:-$((${WHOLE:-480} * slower))}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
export COMMIT CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$OUT" && : >"$OUT/parts.tsv" && : >"$OUT/log.txt" || exit
for file in $RESULTS; do rm -f "$OUT/$file"; done

for part in ${PARTS:-facts:30 starts:75 tests:100 waits:45 parity:45 speed:45 memory:170 resume:100 trl:100 generation:45}; do
  name=${part%:*} most=$((${part#*:} * slower)) left=$((BUDGET - SECONDS - 10)) begun=$SECONDS
  if [ $left -lt 10 ]; then
    ended="no time left"
  else
    limit=$((most < left ? most : left))
    timeout -k 5 $limit "$PYTHON" "benchmarks/$SCRIPT.py" "$name" --out "$OUT" "$@" >>"$OUT/log.txt" 2>&1
    code=$?
    ended="exit $code"
    [ $code = 124 ] || [ $code = 137 ] && ended="stopped after $limit s"
  fi
  printf '%s\t%s s\t%s\n' "$name" $((SECONDS - begun)) "$ended" | tee -a "$OUT/parts.tsv"
done
"$PYTHON" "benchmarks/$SCRIPT.py" table --out "$OUT"
