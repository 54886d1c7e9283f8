#!/usr/bin/env bash
# Runs the program on a TPU slice, from this machine, with gcloud:
#
#   bash launch/tpu.sh [--settings=FILE] [--dry-run] VERB ...
#
# Verbs: check CONFIG, create, wait, setup, run CONFIG, logs, status, stop,
# supervise CONFIG, tensorboard, delete, and jobset CONFIG for GKE. `VERB --help`
# lists its flags; `--dry-run` prints every call of gcloud and makes none.
# Settings are in launch/tpu.env, a copy of launch/tpu.env.example.
# docs/on-a-pod.md has the exit codes; launch/pod/ has the code.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The standard library is enough, so no venv is needed.
python=${GRPO_TPU_PYTHON:-$(find_python)}
# -P: do not import modules from the current folder.
export PYTHONPATH=$root PYTHONDONTWRITEBYTECODE=1
exec "$python" -P -m launch.pod "$@"
