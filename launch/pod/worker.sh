#!/usr/bin/env bash
# What `launch/tpu.sh` has done on each worker, in the folder ~/grpo_tpu:
#
#   worker.sh setup COMMIT SHA256 BUCKET    unpacks ~/grpo_tpu_code.tar.gz
#   worker.sh setup-image IMAGE BUCKET      pulls an image
#   worker.sh run WORKDIR IMAGE FLAG...     starts the program, and leaves it
#   worker.sh status                        NAME=VALUE lines
#   worker.sh logs LINES [follow]
#   worker.sh stop SECONDS [kill]           SIGTERM, and waits for it to save
#   worker.sh tensorboard PORT
#
# What is empty is not used. Exit codes are those of launch/pod/exits.py: 64 a
# bad request, 85 still running, 92 running already, 96 not set up or never run, 1
# anything else.
set -euo pipefail

home=$HOME/grpo_tpu
code=$home/code
state=$home/run
output=$state/log

end() {
  local exit_code=$1
  shift
  printf '%s\n' "$*" >&2
  exit "$exit_code"
}

# Whoever runs the program holds the lock, as does the program itself: no number
# of a process is believed after a restart of the machine.
is_running() {
  [[ -e $state/lock ]] && ! flock -n "$state/lock" true
}

refuse_while_running() {
  if is_running; then end 92 "A run is going on here."; fi
}

mount_point() { printf '%s\n' "$home/buckets/$1"; }

# A bucket that is not mounted would be a folder of this machine alone.
mount_bucket() {
  local folder
  [[ $1 ]] || return 0
  folder=$(mount_point "$1")
  mkdir -p "$folder"
  if mountpoint -q "$folder"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    sudo -n apt-get install --yes --quiet gcsfuse ||
      end 1 "There is no gcsfuse on this machine, nor a package of it; install \
it as cloud.google.com/storage/docs/cloud-storage-fuse/install says, or name a \
WORKDIR on a disk that all workers see."
  fi
  # Checkpoints become visible by renaming their folder.
  sudo -n gcsfuse -o allow_other --uid "$(id -u)" --gid "$(id -g)" \
    --implicit-dirs --rename-dir-limit 100000 "$1" "$folder" ||
    end 1 "The bucket $1 could not be mounted."
}

# The path on this machine of gs://BUCKET/PATH.
local_path() {
  local rest
  if [[ $1 != gs://* ]]; then
    printf '%s\n' "$1"
    return
  fi
  rest=${1#gs://}
  printf '%s/%s\n' "$(mount_point "${rest%%/*}")" "${rest#*/}"
}

bucket_of() {
  local rest=${1#gs://}
  [[ $1 != gs://* ]] || printf '%s\n' "${rest%%/*}"
}

# Python 3.12 is newer than that of most runtimes.
ensure_python() {
  # shellcheck source=launch/setup.sh
  if (source "$code/launch/setup.sh" && find_python) >/dev/null 2>&1; then
    return
  fi
  python3 -m pip install --quiet --user uv
  PATH=$HOME/.local/bin:$PATH uv python install 3.12
}

setup() {
  local commit=$1 sha256=$2 bucket=$3 archive=$HOME/grpo_tpu_code.tar.gz
  refuse_while_running
  sha256sum --check --status <<<"$sha256  $archive" ||
    end 1 "$archive is not what was sent; start again."
  rm -rf "$code.new"
  mkdir -p "$code.new"
  tar -xzf "$archive" -C "$code.new"
  printf '%s\n' "$commit" >"$code.new/COMMIT"
  # Made anew only if what it was made of has changed.
  if [[ -d $code/.venv ]]; then mv "$code/.venv" "$code.new/.venv"; fi
  rm -rf "$code"
  mv "$code.new" "$code"
  if [[ ! ${GRPO_TPU_PYTHON:-} ]]; then
    ensure_python
    export GRPO_TPU_EXTRA=tpu PATH=$HOME/.local/bin:$PATH
    # shellcheck source=launch/setup.sh
    (source "$code/launch/setup.sh" && ensure_venv)
  fi
  mount_bucket "$bucket"
  rm -f "$archive"
}

setup_image() {
  local image=$1 bucket=$2 registry=${1%%/*}
  refuse_while_running
  if [[ $registry == *.pkg.dev || $registry == *gcr.io ]]; then
    sudo -n gcloud auth configure-docker "$registry" --quiet
  fi
  sudo -n docker pull "$image"
  mkdir -p "$code"
  printf '%s\n' "$image" >"$code/COMMIT"
  mount_bucket "$bucket"
}

run() {
  local workdir image=$2
  workdir=$(local_path "$1")
  [[ -e $code/COMMIT ]] || end 96 "Nothing is set up here."
  mount_bucket "$(bucket_of "$1")"
  shift 2
  local arguments=("$@" "--workdir=$workdir")
  mkdir -p "$state"
  exec 9>"$state/lock"
  flock -n 9 || end 92 "A run is going on here."
  rm -f "$state"/{pid,exit_code,stopped}
  printf '%s\n' "$workdir" >"$state/workdir"
  printf '%s' "$image" >"$state/image"
  if [[ $image ]]; then
    command=(
      sudo -n docker run --rm --name grpo_tpu --privileged --net=host
      --user "$(id -u):$(id -g)" --volume "$workdir:$workdir" "$image"
    )
    mkdir -p "$workdir"
  else
    command=("${GRPO_TPU_PYTHON:-$code/.venv/bin/python}" -m grpo_tpu.main)
  fi
  cd "$code"
  # In a session of its own, with no terminal: an ssh that ends, or is cut, does
  # not reach it.
  setsid --fork bash "$HOME/grpo_tpu_worker.sh" guard "${command[@]}" \
    "${arguments[@]}" </dev/null >>"$output" 2>&1
  for _ in {1..100}; do
    if [[ -s $state/pid ]]; then return; fi
    sleep 0.1
  done
  end 1 "The run did not start: see logs."
}

# Stands by the program to write down how it ends.
guard() {
  local exit_code pid
  # A machine that goes down tells everyone; the program has to save first.
  trap : HUP TERM
  printf '%s the run starts: %s\n' "$(date -u +%FT%TZ)" "${*@Q}"
  "$@" &
  pid=$!
  write pid "$pid"
  while
    exit_code=0
    wait "$pid" || exit_code=$?
    kill -0 "$pid" 2>/dev/null
  do :; done
  write exit_code "$exit_code"
  printf '%s the run ended with exit code %s\n' "$(date -u +%FT%TZ)" \
    "$exit_code"
  # Or bash would read on in this file, which a setup may have written anew.
  exit
}

# At once or not at all.
write() {
  printf '%s\n' "$2" >"$state/$1.new"
  mv "$state/$1.new" "$state/$1"
}

say() { printf '%s=%s\n' "$1" "$2"; }

status() {
  local workdir name
  if is_running; then
    say state running
  elif [[ -s $state/exit_code ]]; then
    say state ended
  elif [[ -s $state/pid ]]; then
    # Killed with the machine, or by someone who killed its guard too.
    say state lost
  else
    say state none
  fi
  if [[ -e $state/stopped ]]; then say stopped 1; fi
  for name in exit_code workdir; do
    if [[ -s $state/$name ]]; then say "$name" "$(cat "$state/$name")"; fi
  done
  if [[ -s $code/COMMIT ]]; then say commit "$(cat "$code/COMMIT")"; fi
  [[ -s $state/workdir ]] || return 0
  workdir=$(cat "$state/workdir")
  if [[ -s $workdir/metrics.jsonl ]]; then
    say step "$(tail -n 5 "$workdir/metrics.jsonl" |
      sed -n 's/.*"step": *\([0-9]\{1,\}\)[,}].*/\1/p' | tail -n 1)"
  fi
  if [[ -d $workdir/checkpoints ]]; then
    say checkpoint "$(find "$workdir/checkpoints" -mindepth 1 -maxdepth 1 \
      -type d -printf '%f\n' | sed -n 's/^0*\([0-9]\{1,\}\)$/\1/p' |
      sort -n | tail -n 1)"
  fi
}

logs() {
  [[ -e $output ]] || end 96 "Nothing was ever run here."
  if [[ ${2:-} ]]; then exec tail -n "$1" -F "$output"; fi
  exec tail -n "$1" "$output"
}

# To the program alone: its reward workers end with it. It may be gone already.
signal() {
  if [[ -s $state/image ]]; then
    sudo -n docker kill --signal "$1" grpo_tpu >/dev/null || true
  elif [[ -s $state/pid ]]; then
    kill "-$1" "$(cat "$state/pid")" 2>/dev/null || true
  fi
}

stop() {
  local seconds=$1
  if ! is_running; then return; fi
  # Or `supervise` would start it again.
  touch "$state/stopped"
  signal TERM
  for ((; seconds > 0; seconds--)); do
    sleep 1
    if ! is_running; then return; fi
  done
  if [[ ! ${2:-} ]]; then
    end 85 "The run has not ended in $1 s: wait and \`stop\` again, or \
\`stop --kill\`, which loses what was not saved."
  fi
  signal KILL
}

tensorboard() {
  [[ -s $state/workdir ]] || end 96 "Nothing was ever run here."
  exec "${GRPO_TPU_PYTHON:-$code/.venv/bin/python}" -m tensorboard.main \
    --logdir="$(cat "$state/workdir")" --host=localhost --port="$1"
}

verb=${1:-}
case $verb in
  setup | run | guard | status | logs | stop | tensorboard)
    shift
    "$verb" "$@"
    ;;
  setup-image)
    shift
    setup_image "$@"
    ;;
  *) end 64 "worker.sh does not know '$verb'." ;;
esac
