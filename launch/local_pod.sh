#!/usr/bin/env bash
# Runs the program as a pod does, on this machine: N processes that each take
# themselves for a host of M devices, and talk over loopback:
#
#   bash launch/local_pod.sh -n N [-m M] [--] --config=configs/smoke.py \
#     --workdir=DIR --config.mesh.fsdp=2 ...
#
# N hosts (2 unless said) of M virtual CPU devices each (1 unless said); all
# other arguments are the program's, whose mesh must multiply out to N * M.
# Host K writes DIR/logs/host-K.log; host 0 is also shown here.
#
# The first host to fail ends the others within seconds, and its exit code is
# this script's; 75 (preempted and saved) is it only where no host says worse.
# Ctrl-C and SIGTERM preempt all hosts, a second one kills them.
# Exit codes are the program's; 64 is a mistake on the command line.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# What the others may take to say why they end, once a host has failed; and to
# save what a host that was preempted has saved.
grace_seconds=10
save_seconds=120
hosts=2
devices=1
usage="usage: launch/local_pod.sh -n HOSTS [-m DEVICES] [--] FLAGS OF \
grpo_tpu.main"

while (($#)); do
  case $1 in
    -n | -m)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] ||
        fail "$1 must be followed by a number of at least 1; $usage."
      if [[ $1 == -n ]]; then hosts=$2; else devices=$2; fi
      shift 2
      ;;
    --)
      shift
      break
      ;;
    --*) break ;;
    *) fail "launch/local_pod.sh does not know '$1'; $usage." ;;
  esac
done

workdir=
arguments=()
while (($#)); do
  case $1 in
    --workdir=?*) workdir=${1#*=} ;;
    --workdir)
      workdir=${2:-}
      shift $(($# > 1 ? 2 : 1))
      continue
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ $workdir ]] || fail "--workdir=DIR must say where the run writes; $usage."
[[ $workdir == /* ]] || workdir=$PWD/$workdir
arguments+=("--workdir=$workdir")

# Tests name the interpreter that runs them, and no environment is made.
python=${GRPO_TPU_PYTHON:-}
if [[ ! $python ]]; then
  ensure_venv
  python=$venv/bin/python
fi
cd "$root"
mkdir -p "$workdir/logs"

port=$("$python" -c '
import socket
with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])
')
export JAX_PLATFORMS=cpu
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$hosts
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

# A host dies with this script, however that dies. (Linux; elsewhere it may.)
run_host=("$python" -m grpo_tpu.main)
if setpriv --pdeathsig KILL bash -c : 2>/dev/null; then
  run_host=(setpriv --pdeathsig KILL "${run_host[@]}")
fi

pids=()
for ((host = 0; host < hosts; host++)); do
  output=$workdir/logs/host-$host.log
  export JAX_PROCESS_ID=$host
  if ((host)); then
    "${run_host[@]}" "${arguments[@]}" >>"$output" 2>&1 &
  else
    "${run_host[@]}" "${arguments[@]}" > >(exec tee -a "$output" >&2) 2>&1 &
  fi
  pids+=($!)
done
say "$hosts hosts of $devices devices; each writes $workdir/logs/host-K.log."

# Bash has reaped whoever is not listed, so a number cannot be another's by now.
is_running() { [[ $'\n'$(jobs -rp)$'\n' == *$'\n'"${pids[$1]}"$'\n'* ]]; }

send() {
  local host
  for ((host = 0; host < hosts; host++)); do
    if is_running "$host"; then kill "-$1" "${pids[$host]}" || true; fi
  done 2>/dev/null
}

# The program takes SIGTERM for the notice that its machine will be taken away.
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
  for ((host = 0; host < hosts; host++)); do
    if [[ ${codes[$host]:-} ]] || is_running "$host"; then continue; fi
    codes[host]=0
    wait "${pids[$host]}" 2>/dev/null || codes[host]=$?
    ((codes[host])) || continue
    say "Host $host ended with exit code ${codes[$host]}: \
$workdir/logs/host-$host.log says why."
    # The first to fail says why all ended; being preempted is no failure.
    if ((code == 0 || code == 75)); then code=${codes[$host]}; fi
    if ((codes[host] == 75)); then
      deadline=${deadline:-$((SECONDS + save_seconds))}
    elif ((code == codes[host])); then
      deadline=$((SECONDS + grace_seconds))
    fi
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then send KILL; fi
  sleep 0.1
done
exit "$code"
