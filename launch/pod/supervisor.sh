#!/usr/bin/env bash
# Keeps `supervise` alive on a machine of its own. Compute Engine runs this file
# at each boot, as root; systemd then runs it with the word `supervise`.
set -euo pipefail

root=${GRPO_TPU_ROOT:-}  # Tests have another.
home=$root/var/lib/grpo_tpu
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
cat >"$root/etc/systemd/system/grpo_tpu.service" <<UNIT
[Unit]
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0
[Service]
ExecStart=/bin/bash $home/code/launch/pod/supervisor.sh supervise
Restart=always
RestartSec=60
UNIT
systemctl daemon-reload
systemctl restart grpo_tpu
