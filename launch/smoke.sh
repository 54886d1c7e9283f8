#!/usr/bin/env bash
# Trains a tiny multimodal Gemma 3 with GRPO on synthetic problems, on the TPU of
# this machine or else, with the reason, on the CPU:
#
#   bash launch/smoke.sh [--workdir=DIR] [--config.seed=1 ...]
#
# Everything is written to DIR (default runs/smoke), a folder or gs://BUCKET/PATH,
# with smoke.json at the end. The same command resumes a run that was stopped or
# killed. Settings (--config...) apply to both training stages, but for the number
# of steps and the optimizer's, which are for GRPO alone. JAX_PLATFORMS=cpu leaves a
# TPU alone.
# The exit code is that of the failing stage; 64 is a wrong command line.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

workdir=$root/runs/smoke
seed=0
settings=()
grpo_settings=()
while (($#)); do
  case $1 in
    --workdir=?*) workdir=${1#*=} ;;
    --config.train.num_steps=* | --config.optimizer.*=*)
      grpo_settings+=("$1")
      ;;
    --config.*=*)
      settings+=("$1")
      [[ $1 != --config.seed=* ]] || seed=${1#*=}
      ;;
    *) fail "launch/smoke.sh does not know '$1'. Its arguments are \
--workdir=DIR and settings of configs/smoke.py as --config.NAME=VALUE." ;;
  esac
  shift
done
workdir=$(absolute "$workdir")

# What `launch/tpu.sh setup` has installed on a TPU VM is enough.
if [[ ! ${GRPO_TPU_EXTRA:-} ]] && extra=tpu venv_is_current; then extra=tpu; fi
ensure_venv
cd "$root"
started=$SECONDS
# A run locks its workdir in a bucket itself.
[[ $workdir == gs://* ]] || mkdir -p "$workdir"
if [[ -d $workdir ]] && command -v flock >/dev/null; then
  exec 8>"$workdir/.smoke.lock"
  flock -n 8 || fail "Another smoke run uses $workdir: wait for its end, or \
choose another --workdir=DIR."
fi

# An orphan would write the workdir of the next run.
run_stage=(${tied[@]+"${tied[@]}"} "$venv/bin/python" -m)
if [[ ${JAX_PLATFORMS:-tpu} == *tpu* ]]; then
  read -r devices reason \
    < <("${run_stage[@]}" grpo_tpu.distributed.tpu_host) || true
  if ((devices)); then
    say "Training on the TPU of this machine: $devices devices."
    JAX_PLATFORMS=tpu,cpu
    [[ ${settings[*]-} == *--config.mesh.* ]] ||
      settings+=(--config.mesh.fsdp="$devices")
  elif [[ $reason ]]; then
    say "The TPU cannot be used: $reason."
  fi
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

# The data that configs/smoke.py would draw, once for both stages.
prepare=(
  --source=synthetic --seed="$seed" --num_problems=12000 --difficulty=1
  --kinds="bar_max,color" --image_size=48 --multi_choice_share=0
  --min_options=3 --max_options=4 --eval_fraction=0.1 --vocab_size=1024
  --max_reject_fraction=0 --data_dir="$workdir/data" --overwrite
)
common=(--config.data.dir="$workdir/data" ${settings[@]+"${settings[@]}"})

say "1/3 Preparing data: synthetic images, questions and answers."
"${run_stage[@]}" data_pipelines.prepare "${prepare[@]}" 8>&-
say "2/3 Warm start: supervised training on worked answers."
"${run_stage[@]}" grpo_tpu.main --config=configs/smoke.py:warm_start \
  --workdir="$workdir/warm_start" "${common[@]}" 8>&-
say "3/3 GRPO: sample completions, score them, update the policy."
"${run_stage[@]}" grpo_tpu.main --config=configs/smoke.py \
  --config.model.weights="run:$workdir/warm_start" \
  --workdir="$workdir" "${common[@]}" \
  ${grpo_settings[@]+"${grpo_settings[@]}"} 8>&-

"${run_stage[@]}" launch.smoke_summary "$workdir" $((SECONDS - started))
