#!/usr/bin/env bash
# Writes locks/*.txt: for each version in constraints.txt, the SHA-256 of the files
# that may be installed. Run it after a change of setup.py or constraints.txt:
#
#   bash launch/lock.sh
#
# build.txt has the build tools, base.txt what setup.py requires, dev.txt, tpu.txt
# and reasoning.txt what these extras add, check.txt what reading a config imports,
# and uv.txt the uv of this script and of the workers. Without a change of the pins
# the files stay the same, unless a release got more files. No address of a package
# index is written.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=$(find_python)
"$python" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check --require-hashes \
  --only-binary :all: --requirement locks/uv.txt

# Keeps what is pinned and not in base.txt. Other versions are for machines that
# no pin supports, such as Windows.
filter='
import pathlib, re, sys
source, base, pins = (pathlib.Path(x).read_text() for x in sys.argv[1:])
pins = re.findall(r"^[\w.-]+==[\w.]+", pins, re.M)
print("# Written by launch/lock.sh; do not edit.")
for part in re.split(r"\n(?=\w)", source.strip()):
  first, _, _ = part.partition("\n")
  if first.split()[0] in pins and first not in base.splitlines():
    print(part)
'

# compile NAME ARGUMENT...: writes the lock of these requirements.
compile() {
  local name=$1 base=/dev/null
  shift
  "$folder/venv/bin/uv" --quiet pip compile --universal --python-version 3.12 \
    --generate-hashes --no-annotate --no-header --constraint constraints.txt \
    "$@" >"$folder/$name.txt"
  case $name in dev | tpu | reasoning) base=locks/base.txt ;; esac
  "$python" -I -c "$filter" "$folder/$name.txt" "$base" constraints.txt \
    >"$folder/$name.lock"
  mv "$folder/$name.lock" "locks/$name.txt"
}

compile base setup.py
compile dev setup.py --extra dev --extra export
compile tpu setup.py --extra tpu
compile reasoning setup.py --extra reasoning
compile build - <<<$'setuptools\nwheel'
compile uv - <<<uv
# tests/grpo_tpu/planning/check_test.py holds the list.
compile check - <<<$'absl-py\nflax\ngoogle-crc32c\njax\njaxtyping\nml-collections\nnumpy\npillow\nsafetensors\nsentencepiece'
