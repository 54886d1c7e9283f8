# shellcheck shell=bash
# The environment of every script here: `.venv`, complete and current, made on
# a machine that has Python and nothing else. Sourced, never run. Its extra is
# `dev`, or $GRPO_TPU_EXTRA: `tpu` on the workers of a slice.
#
# A venv is trusted only for its stamp, which is written last and says what it
# was made from: setup.py, constraints.txt, the extra, the interpreter, the
# place of the checkout. Without a matching stamp (killed half way, pins
# changed, Python upgraded, folder moved) the venv is made again; with one,
# nothing is run but the comparison. What it does not know: what is done in the
# venv afterwards.
#
# A venv of your own, named by $GRPO_TPU_VENV, is used as it stands: it is never
# made, checked or changed, and what is in it is your affair.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${GRPO_TPU_VENV:-$root/.venv}
stamp=$venv/complete.stamp
log=$venv/install.log
extra=${GRPO_TPU_EXTRA:-dev}

# TensorFlow only writes event files here; its start-up notices are noise.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
export GRPC_VERBOSITY=ERROR GLOG_minloglevel=2

say() { printf '%s\n' "$*" >&2; }

# For what the user can mend: the command line, the machine, the data.
fail() {
  say "$*"
  exit 64
}

# Prints the interpreter behind a command (not a shim, not a venv that is about
# to be cleared), or says why it will not do. Python 2 must be able to read it.
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

# One candidate a line, best first: the version that the pins were made on
# before the other, what is on PATH before what lies elsewhere.
python_candidates() {
  local name folder
  for name in python3.12 python3.13 python3 python; do
    type -aP "$name" || true
  done
  for name in 3.12 3.13; do
    for folder in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
      printf '%s\n' "$folder/versions/$name"*/bin/python
    done
  done
  if command -v uv >/dev/null; then
    for name in 3.12 3.13; do
      uv python find --no-project "$name" 2>/dev/null || true
    done
  fi
}

find_python() {
  local candidate answer seen=""
  while IFS= read -r candidate; do
    [[ -x $candidate && $seen != *"  $candidate "* ]] || continue
    if answer=$("$candidate" -c "$probe" 2>&1 </dev/null); then
      printf '%s\n' "${answer##*$'\n'}"
      return
    fi
    case $answer in
      "is "* | "has "*) ;;
      *) answer="does not start" ;;
    esac
    seen+="  $candidate $answer"$'\n'
  done < <(python_candidates)
  fail "grpo_tpu needs Python 3.12 or 3.13 (newer ones have no TensorFlow \
build yet), with its venv module. Looked on PATH, in pyenv and in uv, and found
${seen:-  no Python at all
}Install one, for example with \`apt install python3.12-venv\`, \
\`pyenv install 3.12\` or \`uv python install 3.12\`, and start again."
}

# What the stamp should say; nothing if the venv has no working Python.
expected_stamp() {
  "$venv/bin/python" -I -c '
import hashlib, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
words = os.fsencode(root) + sys.version.encode() + sys.argv[2].encode()
digest = hashlib.sha256(words)
for name in ("setup.py", "constraints.txt"):
  digest.update((root / name).read_bytes())
print(digest.hexdigest())
' "$root" "$extra" 2>/dev/null
}

venv_is_current() {
  local expected
  [[ -f $stamp ]] && expected=$(expected_stamp) &&
    [[ $(cat "$stamp") == "$expected" ]]
}

install() {
  "$venv/bin/python" -m pip install --quiet --progress-bar off --log "$log" \
    --constraint constraints.txt "$@" && return
  say "pip could not install the pinned set: its reason stands above, the \
details in $log. Once it is mended, start again."
  exit 1
}

# The folder itself, if it is there, where a link to it is given.
real_folder() { (cd "$1" 2>/dev/null && pwd -P) || printf '%s\n' "$1"; }

make_venv() {
  local python
  python=$(find_python) || exit
  say "Making .venv with $python: a few minutes, once (details in $log)."
  # The user's other settings of pip hold; these would install elsewhere.
  unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  rm -f "$stamp"
  # Cleared, not removed: .venv may be a link to a larger disk (which the venv
  # module clears and then refuses, unless it gets the folder itself).
  "$python" -m venv --clear "$(real_folder "$venv")" || exit
  cd "$root" || exit
  # The build tools are pinned too, so they are not fetched anew per package.
  install setuptools wheel
  install --no-build-isolation --editable ".[$extra]"
  expected_stamp >"$stamp.new" && mv "$stamp.new" "$stamp"
}

# Returns with a venv that is complete and current, or ends the script.
ensure_venv() {
  if [[ -n ${GRPO_TPU_VENV:-} ]]; then
    [[ -x $venv/bin/python ]] || fail "GRPO_TPU_VENV ($venv) must name a venv, \
with bin/python in it; make one there, or leave it out and .venv is made."
    [[ $venv == /* ]] || venv=$PWD/$venv
    return
  fi
  if venv_is_current; then return; fi
  (
    # Two first runs at once would install into each other. The lock is held
    # by pip too, should it outlive a killed script. (macOS has no flock.)
    if command -v flock >/dev/null && ! flock -n 9; then
      say "Waiting for another set-up of .venv to end."
      flock 9
    fi
    if ! venv_is_current; then make_venv; fi
  ) 9>"$root/.venv.lock" || exit
}
