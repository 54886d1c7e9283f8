#!/usr/bin/env bash
# Keeps `supervise` alive on a machine of its own. Compute Engine runs this file
# at each boot, as root; systemd then runs it with the word `supervise`.
set -euo pipefail

home=${GRPO_TPU_ROOT:-}/var/lib/grpo_tpu  # Tests have another root.
export HOME=${HOME:-/root} PATH=$PATH:/snap/bin
export GRPO_TPU_PYTHON=${GRPO_TPU_PYTHON:-/usr/bin/python3}
# The launcher writes its exit code there, unless it crashes.
export GRPO_TPU_ENDED=$home/ended
mkdir -p "$home"
cd "$home"

if [[ ${1:-} == supervise ]]; then
  # After a crash systemd starts this again.
  [[ -e ended ]] || bash command.sh || [[ -e ended ]]
  # Nobody may be watching: the slice must not cost money. With 92 it is the slice
  # of another supervisor.
  [[ $(<ended) == 92 ]] ||
    until bash code/launch/tpu.sh delete; do sleep 60; done
  systemctl poweroff
  exit
fi

attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
until
  url=$(curl -sSf -H "Metadata-Flavor: Google" "$attributes/files") &&
    gcloud storage cp "$url" files.tar.gz &&
    tar --no-same-owner -xzf files.tar.gz
do sleep 10; done
systemd-run --unit=grpo_tpu --property=Restart=always --property=RestartSec=60 \
  bash "$home/code/launch/pod/supervisor.sh" supervise
