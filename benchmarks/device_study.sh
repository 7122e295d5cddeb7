#!/usr/bin/env bash
# The study of the default recipe with 8 seeds, and four recipes on two sets of real pairs, on one GPU within BUDGET
# seconds, the most wanted first:
#
#   OUT=folder BUDGET=360 PYTHON=python3 DATA=folder WORK=folder bash benchmarks/device_study.sh [--tiny]
#
# A part that fails or is stopped keeps all runs that have ended. OUT (benchmarks/results/device_study) then holds
# recipe.csv, recipe.md, recipe_prompts.csv, pairs.csv, pairs.md, pairs_heldout.csv, parts.tsv and log.txt. DATA: folder
# of ultrafeedback_pairs.jsonl.gz and alpaca_eval_pairs.jsonl.gz, ../shared/data if not given. WORK (runs/device_study,
# with --tiny runs/device_study_tiny): the run folders. The same command continues there; another WORK starts anew.
# --tiny: 8 pairs, a tiny model, the candidates and two of the recipes, on the CPU where there is no GPU.
export OUT=${OUT:-$(dirname "$0")/results/device_study} SCRIPT=device_study WHOLE=360
export RESULTS='recipe.csv recipe.md recipe_prompts.csv pairs.csv pairs.md pairs_heldout.csv'
[ "${1:-}" = --tiny ] && parts='candidates:170 pairs:110'
export PARTS=${PARTS:-${parts:-candidates:170 pairs:110 controls:360}}
exec bash "$(dirname "$0")/device.sh" "$@"
