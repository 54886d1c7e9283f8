#!/usr/bin/env bash
# The commands that `launch/tpu.sh` runs on each worker, in ~/grpo_tpu:
#
#   worker.sh setup COMMIT SHA256           unpack ~/grpo_tpu_code.tar.gz
#   worker.sh setup-image IMAGE             pull an image
#   worker.sh run WORKDIR IMAGE FLAG...     start the program and return
#   worker.sh status                        print NAME=VALUE lines
#   worker.sh logs LINES [follow]
#   worker.sh stop SECONDS [kill]           send SIGTERM, wait for the save
#   worker.sh tensorboard PORT
#
# IMAGE may be empty. ~/grpo_tpu_env may have the environment of the next run.
# Exit codes are those of launch/pod/exits.py, and 1 for anything else.
set -euo pipefail

home=$HOME/grpo_tpu
code=$home/code
state=$home/run
output=$state/log

# fail EXIT_CODE MESSAGE
fail() {
  printf '%s\n' "$2" >&2
  exit "$1"
}

# The program and its guard hold the lock. A process id alone proves nothing: it
# may be reused after the machine restarts.
is_running() {
  [[ -e $state/lock ]] && ! flock -n "$state/lock" true
}

require_no_run() { ! is_running || fail 92 "A run exists on this worker."; }

# Most runtimes have an older Python than 3.12.
ensure_python() {
  local apt
  # shellcheck source=launch/setup.sh
  if (source "$code/launch/setup.sh" && find_python) >/dev/null 2>&1; then
    return
  fi
  if ! python3 -m pip --version >/dev/null 2>&1; then
    # A new machine installs its updates first, which takes minutes.
    apt=(sudo -n apt-get -o DPkg::Lock::Timeout=600 --yes --quiet)
    "${apt[@]}" update || true
    "${apt[@]}" install python3-pip || fail 1 "apt-get cannot install pip."
  fi
  # Newer systems let pip change only environments, unless the user insists.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user \
    --require-hashes --only-binary :all: --requirement "$code/locks/uv.txt"
  # uv knows the SHA-256 of each version.
  PATH=$HOME/.local/bin:$PATH uv python install 3.12.14
}

setup() {
  local commit=$1 sha256=$2 archive=$HOME/grpo_tpu_code.tar.gz
  require_no_run
  sha256sum --check --status <<<"$sha256  $archive" ||
    fail 1 "The checksum of $archive is wrong; run setup again."
  rm -rf "$code.new"
  mkdir -p "$code.new"
  tar -xzf "$archive" -C "$code.new"
  printf '%s\n' "$commit" >"$code.new/COMMIT"
  # launch/setup.sh keeps the environment if its inputs have not changed.
  if [[ -d $code/.venv ]]; then mv "$code/.venv" "$code.new/.venv"; fi
  rm -rf "$code"
  mv "$code.new" "$code"
  if [[ ! ${GRPO_TPU_PYTHON:-} ]]; then
    ensure_python
    export GRPO_TPU_EXTRA=tpu PATH=$HOME/.local/bin:$PATH
    # shellcheck source=launch/setup.sh
    (source "$code/launch/setup.sh" && ensure_venv)
  fi
  rm -f "$archive"
}

setup_image() {
  local image=$1 registry=${1%%/*}
  require_no_run
  if [[ $registry == *.pkg.dev || $registry == *gcr.io ]]; then
    sudo -n gcloud auth configure-docker "$registry" --quiet
  fi
  sudo -n docker pull "$image"
  mkdir -p "$code"
  printf '%s\n' "$image" >"$code/COMMIT"
}

# libtpu leaves its lock behind when it is killed, and then refuses to start. Only
# root sees the files that all processes hold.
remove_stale_lock() {
  # shellcheck disable=SC2016 # The inner shell expands $0.
  sudo -n bash -c 'find /proc/[0-9]*/fd \( -lname "$0" -o -lname "/dev/accel*" \
    -o -lname "/dev/vfio/[0-9]*" \) 2>/dev/null | grep -q . || rm -f "$0"' \
    /tmp/libtpu_lockfile 2>/dev/null || true
}

run() {
  local workdir=$1 image=$2 volume=() command
  shift 2
  trap 'rm -f "$HOME/grpo_tpu_env"' EXIT
  [[ -e $code/COMMIT ]] || fail 96 "This worker is not set up."
  mkdir -p "$state"
  exec 9>"$state/lock"
  flock -n 9 || fail 92 "A run exists on this worker."
  rm -f "$state"/{pid,exit_code,stopped,env}
  if [[ -e $HOME/grpo_tpu_env ]]; then mv "$HOME/grpo_tpu_env" "$state/env"; fi
  printf '%s\n' "$workdir" >"$state/workdir"
  printf '%s' "$image" >"$state/image"
  # Otherwise libtpu's logs fill the disk.
  export TPU_LOG_DIR=disabled
  # The log outlives the machine: the program copies it to a bucket.
  export GRPO_TPU_LOG=$output
  if [[ -L $output ]]; then rm "$output"; fi
  if [[ $workdir != gs://* ]]; then
    mkdir -p "$workdir/logs"
    ln -sf "$workdir/logs/worker-$HOSTNAME.log" "$output"
    volume=(--volume "$workdir:$workdir")
  fi
  if [[ $image ]]; then
    mkdir -p "$home/container"
    touch "$state/env"
    command=(
      sudo -n docker run --rm --init --name grpo_tpu --privileged --net=host
      --ulimit memlock=-1 --user "$(id -u):$(id -g)"
      --volume "$home/container:/home/run" --env HOME=/home/run
      --volume "$state:/grpo_tpu_run" --env GRPO_TPU_LOG=/grpo_tpu_run/log
      --env-file "$state/env" "${volume[@]}" "$image"
    )
    # A machine that went down may have left it.
    sudo -n docker rm --force grpo_tpu >/dev/null 2>&1 || true
  else
    command=("${GRPO_TPU_PYTHON:-$code/.venv/bin/python}" -m grpo_tpu.main)
    remove_stale_lock
  fi
  cd "$code"
  # A session of its own, without a terminal: the end of ssh does not reach it.
  setsid --fork bash "$HOME/grpo_tpu_worker.sh" guard "${command[@]}" "$@" \
    "--workdir=$workdir" </dev/null >>"$output" 2>&1
  for _ in {1..100}; do
    if [[ -s $state/pid ]]; then return; fi
    sleep 0.1
  done
  fail 1 "The run did not start; read its logs."
}

# Runs the program, with the variables of its environment; records its exit code.
guard() {
  local exit_code pid
  # A machine that shuts down signals every process; the program must save first.
  trap : HUP TERM
  printf '%s the run starts: %s\n' "$(date -u +%FT%TZ)" "${*@Q}"
  (
    if [[ -s $state/env ]]; then
      mapfile -t grpo_tpu_env <"$state/env"
      export "${grpo_tpu_env[@]}"
    fi
    exec "$@"
  ) &
  pid=$!
  echo "$pid" >"$state/pid"
  while
    exit_code=0
    wait "$pid" || exit_code=$?
    kill -0 "$pid" 2>/dev/null
  do :; done
  echo "$exit_code" >"$state/exit_code"
  printf '%s the run ended with exit code %s\n' "$(date -u +%FT%TZ)" \
    "$exit_code"
  # Bash reads this file as it runs, and a setup may have replaced the file.
  exit
}

# Prints NAME=TEXT for the last log line of this run whose text, behind the
# logger's prefix with the LEVEL, matches the PATTERN. The text is what the first
# group of the pattern has matched.
# last_said NAME PATTERN [LEVEL]
last_said() {
  local line
  line=$(tail -n 4000 "$output" 2>/dev/null | tac |
    sed '/^[^ ]*Z the run starts: /q' |
    sed -nE "s/^${3:-[A-Z]}[0-9]{4} [^]]*\] $2$/\1/p" | head -n 1) || true
  if [[ $line ]]; then echo "$1=${line:0:500}"; fi
}

status() {
  local file name
  if is_running; then
    echo state=running
  elif [[ -s $state/exit_code ]]; then
    echo state=ended
  elif [[ -s $state/pid ]]; then
    # The machine went down, or someone killed the guard too.
    echo state=lost
  fi
  for file in "$state"/{stopped,exit_code} "$code/COMMIT"; do
    name=${file##*/}
    if [[ -s $file ]]; then echo "${name,,}=$(<"$file")"; fi
  done
  [[ -s $state/workdir ]] || return 0
  last_said progress '(step [0-9]+\/[0-9]+ .*)'
  last_said step 'step ([0-9]+)\/.*'
  # A later line counts.
  last_said checkpoint 'Restoring .*\/0*([0-9]+)[^\/]*'
  last_said checkpoint 'Saved .*\/0*([0-9]+)[^\/]*'
  if ! is_running; then
    last_said error '(.*)' E
    last_said end '((Finished|Stopped).*)'
    last_said next '(Next: .*)'
  fi
}

logs() {
  [[ -e $output ]] || fail 96 "This worker has no run."
  exec tail -n "$1" ${2:+-F} "$output"
}

# Signals the program alone, which ends its own reward workers. The program may
# have ended already.
signal() {
  if [[ -s $state/image ]]; then
    sudo -n docker kill --signal "$1" grpo_tpu >/dev/null || true
  elif [[ -s $state/pid ]]; then
    kill "-$1" "$(cat "$state/pid")" 2>/dev/null || true
  fi
}

stop() {
  if ! is_running; then return; fi
  # Tells `supervise` not to restart the run.
  echo 1 >"$state/stopped"
  signal TERM
  if flock --wait "$1" "$state/lock" true; then return; fi
  [[ ${2:-} ]] || fail 85 "The run has not ended after $1 s: wait and \`stop\` \
again, or \`stop --kill\`, which loses unsaved work."
  signal KILL
}

tensorboard() {
  [[ -s $state/workdir ]] || fail 96 "This worker has no run."
  exec "${GRPO_TPU_PYTHON:-$code/.venv/bin/python}" -m tensorboard.main \
    --logdir="$(cat "$state/workdir")" --host=localhost --port="$1"
}

case ${1:-} in
  setup | setup-image | run | guard | status | logs | stop | tensorboard)
    verb=$1
    shift
    "${verb/-/_}" "$@"
    ;;
  *) fail 64 "worker.sh has no verb '${1:-}'." ;;
esac
