#!/usr/bin/env bash
# A TPU slice and a run on it, from this machine, by gcloud:
#
#   bash launch/tpu.sh [--settings=FILE] [--dry-run] VERB ...
#
# create, wait, setup, run CONFIG, logs, status, stop, supervise CONFIG,
# tensorboard, delete, and jobset CONFIG for GKE. `--help` after a verb says
# what it takes; `--dry-run` prints every call of gcloud and makes none.
# Settings are in launch/tpu.env, to be copied from launch/tpu.env.example.
# Exit codes are in docs/on-a-pod.md; what decides is in launch/pod/.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Nothing but Python's own library is needed here.
python=${GRPO_TPU_PYTHON:-}
if [[ ! $python ]]; then python=$(find_python); fi
# -P: a file in the folder where the user stands is no module.
export PYTHONPATH=$root PYTHONDONTWRITEBYTECODE=1
exec "$python" -P -m launch.pod "$@"
