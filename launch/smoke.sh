#!/usr/bin/env bash
# Trains a tiny multimodal Gemma 3 with GRPO on drawn problems, on this
# machine's CPU, start to finish:
#
#   bash launch/smoke.sh [--workdir=DIR] [--config.seed=1 ...]
#
# DIR (default runs/smoke) receives everything and, at the end, smoke.json.
# Stopped anywhere, even killed, it goes on when started again with the same
# DIR. Every other argument goes to both training stages as a config override.
# Exit codes are those of the stages; 64 is a mistake on the command line.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

workdir=$root/runs/smoke
seed=0
overrides=()
while (($#)); do
  case $1 in
    --workdir=?*) workdir=${1#*=} ;;
    --config.*=*)
      overrides+=("$1")
      [[ $1 != --config.seed=* ]] || seed=${1#*=}
      ;;
    *) fail "launch/smoke.sh does not know '$1': it takes --workdir=DIR and \
settings of configs/smoke.py, written --config.NAME=VALUE." ;;
  esac
  shift
done
[[ $workdir == /* ]] || workdir=$PWD/$workdir

ensure_venv
cd "$root"
started=$SECONDS
mkdir -p "$workdir"
if command -v flock >/dev/null; then
  exec 8>"$workdir/.smoke.lock"
  flock -n 8 || fail "Another smoke run is at work in $workdir: wait \
for it, or give this one its own --workdir=DIR."
fi

# A stage dies with this script, however that dies: an orphan would go on
# writing the workdir that the next start resumes. (Linux; elsewhere it may.)
run_stage=("$venv/bin/python" -m)
if setpriv --pdeathsig KILL bash -c : 2>/dev/null; then
  run_stage=(setpriv --pdeathsig KILL "${run_stage[@]}")
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# What configs/smoke.py would draw by itself, one set for both stages.
prepare=(
  --source=synthetic
  --seed="$seed"
  --num_problems=12000
  --difficulty=1
  --kinds="bar_max,color"
  --image_size=48
  --multi_choice_share=0
  --min_options=3
  --max_options=4
  --eval_fraction=0.1
  --vocab_size=1024
  --max_reject_fraction=0
  --data_dir="$workdir/data"
)
common=(--config.data.dir="$workdir/data" ${overrides[@]+"${overrides[@]}"})

say "1/3 Drawing problems: pictures, questions, exact answers."
"${run_stage[@]}" data_pipelines.prepare "${prepare[@]}" 8>&-
say "2/3 Warm start: supervised training on worked answers."
"${run_stage[@]}" grpo_tpu.main --config=configs/smoke.py:warm_start \
  --workdir="$workdir/warm_start" "${common[@]}" 8>&-
say "3/3 GRPO: sampling, scoring, learning from the better half."
"${run_stage[@]}" grpo_tpu.main --config=configs/smoke.py \
  --config.model.weights="run:$workdir/warm_start" \
  --workdir="$workdir" "${common[@]}" 8>&-

"$venv/bin/python" launch/smoke_summary.py "$workdir" $((SECONDS - started))
