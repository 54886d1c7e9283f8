# shellcheck shell=bash
# The environment of every script here: `.venv`, complete and current, on a
# machine that has only Python. Scripts source this file. The installed extra is
# `dev`, or $GRPO_TPU_EXTRA: `tpu` on the workers of a slice. pip installs only
# files whose SHA-256 is in locks/, which launch/lock.sh writes.
#
# A venv is used only if its stamp, which is written last, has setup.py, the locks,
# the extra, the interpreter and the folder of the checkout. Otherwise it is made
# from scratch. Later changes inside the venv are not noticed.
#
# $GRPO_TPU_BASE_PYTHON names the Python to make .venv with. $GRPO_TPU_VENV names
# a venv of your own, which is used without any check.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${GRPO_TPU_VENV:-$root/.venv}
stamp=$venv/complete.stamp
log=$venv/install.log
extra=${GRPO_TPU_EXTRA:-dev}

# TensorFlow only writes event files here; its start-up messages are noise.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
export GRPC_VERBOSITY=ERROR GLOG_minloglevel=2

# Makes a command die with this script, even if the script is killed. (Linux.)
# shellcheck disable=SC2034 # Other scripts use it.
if setpriv --pdeathsig KILL bash -c : 2>/dev/null; then
  tied=(setpriv --pdeathsig KILL)
fi

say() { printf '%s\n' "$*" >&2; }

# For errors that the user can fix: the command line, the machine, the data.
fail() {
  say "$*"
  exit 64
}

# absolute PATH: prints it from the root. The shell expands no ~ after --workdir=.
absolute() {
  case $1 in
    /* | gs://*) printf '%s\n' "$1" ;;
    \~ | \~/*) printf '%s\n' "$HOME${1:1}" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

# Prints the path of the real interpreter (not of a shim, nor of a venv that is
# about to be cleared), or the reason to reject it. Also valid in Python 2.
probe='
import sys
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
  sys.exit("is Python %d.%d" % sys.version_info[:2])
if sys.implementation.name != "cpython" or "t" in sys.abiflags:
  sys.exit("is not the usual build of CPython")
for module in ("ctypes", "ensurepip", "ssl", "venv", "zlib"):
  try:
    __import__(module)
  except ImportError:
    sys.exit("has no module " + module)
print(sys._base_executable or sys.executable)
'

# One candidate per line, best first: PATH before other folders, and 3.12, the
# version of the pins, before 3.13.
python_candidates() {
  local name
  if [[ ${GRPO_TPU_BASE_PYTHON:-} ]]; then
    type -aP "$GRPO_TPU_BASE_PYTHON" || true
    return
  fi
  type -aP python3.12 python3.13 python3 python || true
  for name in 3.12 3.13; do
    printf '%s\n' "${PYENV_ROOT:-}/versions/$name"*/bin/python \
      "${HOME:-}/.pyenv/versions/$name"*/bin/python
    uv python find --no-project "$name" 2>/dev/null || true
  done
}

find_python() {
  local candidate answer rejected=""
  while IFS= read -r candidate; do
    [[ -x $candidate && $rejected != *"  $candidate "* ]] || continue
    if answer=$("$candidate" -c "$probe" 2>&1 </dev/null); then
      printf '%s\n' "${answer##*$'\n'}"
      return
    fi
    [[ $answer =~ ^(is|has)" " ]] || answer="does not start"
    rejected+="  $candidate $answer"$'\n'
  done < <(python_candidates)
  fail "grpo_tpu needs Python 3.12 or 3.13 (TensorFlow has no build for newer \
ones), with the venv module. PATH, pyenv and uv have:
${rejected:-  no Python at all
}Install one, for example with \`apt install python3.12-venv\`, \
\`pyenv install 3.12\` or \`uv python install 3.12\`, and rerun."
}

# Sets `locks`: the build tools', two that are required, one that is optional. The
# one of `check` is complete.
list_locks() {
  locks=(locks/build.txt locks/base.txt "locks/$extra.txt" locks/reasoning.txt)
  if [[ $extra == check ]]; then locks=(locks/build.txt locks/check.txt); fi
}

# The stamp of a current venv; it ends early if the venv has no working Python.
expected_stamp() {
  local locks
  list_locks
  printf '%s\n' "$root" "$extra"
  "$venv/bin/python" -I -c 'import sys; print(sys.version)' 2>/dev/null &&
    (cd "$root" && cat setup.py "${locks[@]}")
}

venv_is_current() {
  [[ -f $stamp && $(cat "$stamp") == "$(expected_stamp)" ]]
}

install() {
  "$venv/bin/python" -m pip install --quiet --progress-bar off --log "$log" \
    "$@" && return
  say "pip could not install the pinned set. The reason is above, the details \
are in $log. Fix it and rerun."
  exit 1
}

# The locks are complete. Only these packages have no wheel; pycosat needs a C
# compiler.
locked=(--no-deps --require-hashes --only-binary :all:
  --no-binary "promise,cellpylib,pycosat,zss")

make_venv() {
  local python locks target
  python=$(find_python) || exit
  say "Making ${venv##*/} with $python; this takes minutes, once. Details: $log"
  # These settings of pip would install elsewhere; the user's others apply.
  unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  rm -f "$stamp"
  # .venv may be a link to a larger disk. The venv module clears the target of a
  # link and then fails, so it gets the target.
  if [[ -d $venv ]]; then target=$(cd "$venv" && pwd -P); fi
  "$python" -m venv --clear "${target:-$venv}" || exit
  cd "$root" || exit
  # The build tools are locked too, and installed once instead of per package.
  list_locks
  install "${locked[@]}" --requirement "${locks[0]}"
  locks=("${locks[@]/#/--requirement=}")
  install "${locked[@]}" --no-build-isolation "${locks[@]:1:2}"
  if [[ $extra != check ]]; then
    install --no-deps --no-build-isolation --editable .
    (install "${locked[@]}" --no-build-isolation "${locks[3]}" 2>/dev/null) ||
      say "Left out reasoning-gym, which needs a C compiler and Python's headers \
(details: $log). To use its tasks, install these (for example \`apt install \
build-essential python3.12-dev\`) and run \`$venv/bin/pip install --constraint \
constraints.txt reasoning-gym\`."
  fi
  expected_stamp >"$stamp.new" && mv "$stamp.new" "$stamp"
}

# Makes the venv complete and current, or ends the script.
ensure_venv() {
  if [[ ${GRPO_TPU_VENV:-} ]]; then
    [[ -x $venv/bin/python ]] || fail "GRPO_TPU_VENV ($venv) must be a venv \
with bin/python; make one there, or unset GRPO_TPU_VENV to use .venv."
    [[ $venv == /* ]] || venv=$PWD/$venv
    return
  fi
  if venv_is_current; then return; fi
  (
    # Prevents two set-ups at once. pip inherits the lock and keeps it if the
    # script is killed. (macOS has no flock.)
    if command -v flock >/dev/null && ! flock -n 9; then
      say "Waiting for another set-up of ${venv##*/} to end."
      flock 9
    fi
    if ! venv_is_current; then make_venv; fi
  ) 9>"$root/${venv##*/}.lock" || exit
}

# Makes a venv that can read configs, unless .venv is there: a laptop that only
# starts runs needs a tenth of it.
ensure_check_venv() {
  if [[ ! ${GRPO_TPU_VENV:-} ]] && ! venv_is_current; then
    venv=$root/.venv-check extra=check
    stamp=$venv/complete.stamp log=$venv/install.log
  fi
  ensure_venv
}
