#!/usr/bin/env bash
# Runs the program like a pod on this machine: N processes on loopback, each a
# host of M virtual CPU devices.
#
#   bash launch/local_pod.sh -n N [-m M] [--] --config=configs/smoke.py \
#     --workdir=DIR --config.mesh.fsdp=2 ...
#
# N is 2 and M is 1 by default; the mesh must have N * M devices. Host K writes
# DIR/logs/host-K.log, or below runs/ if DIR is in a bucket; the output of host 0 is
# also shown here.
#
# When a host fails, the script ends the others within seconds and exits with the
# code of the first failure, or with 75 if all were preempted. Ctrl-C and SIGTERM
# preempt all hosts; a second one kills them. 64 is a wrong command line.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The time that the other hosts get after a failure, to report it, and after a
# preemption, to save.
grace_seconds=10
save_seconds=120
hosts=2
devices=1
usage="usage: launch/local_pod.sh -n HOSTS [-m DEVICES] [--] FLAGS OF \
grpo_tpu.main"

workdir=
arguments=()
while (($#)); do
  case $1 in
    -n | -m)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] ||
        fail "$1 must be followed by a number of at least 1; $usage."
      if [[ $1 == -n ]]; then hosts=$2; else devices=$2; fi
      shift
      ;;
    --) ;;
    --workdir=*) workdir=${1#*=} ;;
    --workdir)
      workdir=${2:-}
      shift
      ;;
    *)
      # Behind a flag it may be its value.
      [[ $1 == -* ]] || ((${#arguments[@]})) ||
        fail "launch/local_pod.sh does not know '$1'; $usage."
      arguments+=("$1")
      ;;
  esac
  shift || break
done
[[ $workdir ]] || fail "--workdir=DIR must name a folder for the run; $usage."
workdir=$(absolute "$workdir")
arguments+=("--workdir=$workdir")
logs=$workdir/logs
if [[ $workdir == gs://* ]]; then logs=$root/runs/${workdir##*/}/logs; fi

# Tests set the interpreter and need no venv.
python=${GRPO_TPU_PYTHON:-}
if [[ ! $python ]]; then
  ensure_venv
  python=$venv/bin/python
fi
cd "$root"
mkdir -p "$logs"

port=$("$python" -c '
import socket
print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])
')
export JAX_PLATFORMS=cpu
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$hosts
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

run_host=(${tied[@]+"${tied[@]}"} "$python" -m grpo_tpu.main)
pids=()
for ((host = 0; host < hosts; host++)); do
  output=$logs/host-$host.log
  export JAX_PROCESS_ID=$host
  if ((host)); then
    "${run_host[@]}" "${arguments[@]}" >>"$output" 2>&1 &
  else
    # Ctrl-C must not end the log before the host has said its last words.
    "${run_host[@]}" "${arguments[@]}" \
      > >(trap '' INT && exec tee -a "$output" >&2) 2>&1 &
  fi
  pids+=($!)
done
say "Started $hosts hosts of $devices devices; logs: $logs/host-K.log"

# Bash lists its running children, so a reused process id does not matter.
# shellcheck disable=SC2046 # A word for each process.
send() { kill "-$1" $(jobs -rp) 2>/dev/null || true; }

# The program treats SIGTERM as a preemption notice.
# shellcheck disable=SC2329 # Called by the trap.
stop() {
  send "${next_signal:-TERM}"
  next_signal=KILL
}
trap stop INT TERM

code=0
deadline=
codes=()
while ((${#codes[@]} < hosts)); do
  running=$'\n'$(jobs -rp)$'\n'
  for ((host = 0; host < hosts; host++)); do
    if [[ ${codes[$host]:-} || $running == *$'\n'${pids[$host]}$'\n'* ]]; then
      continue
    fi
    codes[host]=0
    wait "${pids[$host]}" 2>/dev/null || codes[host]=$?
    ((codes[host])) || continue
    say "Host $host ended with exit code ${codes[$host]}; see \
$logs/host-$host.log."
    # The first failure explains the end of all hosts. Preemption is no failure.
    if ((code == 0 || code == 75)); then code=${codes[$host]}; fi
    if ((codes[host] == 75)); then
      deadline=${deadline:-$((SECONDS + save_seconds))}
    elif ((code == codes[host])); then
      deadline=$((SECONDS + grace_seconds))
    fi
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then send KILL; fi
  sleep 0.1 || true # Ctrl-C kills it too, and must not end the script.
done
exit "$code"
