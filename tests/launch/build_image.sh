#!/usr/bin/env bash
# Builds the Dockerfile without a registry or a Docker engine, and trains a few
# steps inside, with the image's user and entrypoint:
#
#   bash tests/launch/build_image.sh FOLDER
#
# Needs root, buildah and debootstrap, 15 GiB in FOLDER and some minutes; exits
# with 77 if these are missing. The base is a Debian with this machine's Python
# 3.12 ($GRPO_TPU_PYTHON, or python3.12). Files that pip needs are mounted during
# the build; $IMAGE_VOLUMES adds more, separated by colons.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
folder=$(realpath "${1:?usage: build_image.sh FOLDER}")

cannot() {
  printf '%s\n' "Skipped: $*" >&2
  exit 77
}

((EUID == 0)) || cannot "root is needed."
for command in buildah debootstrap; do
  command -v "$command" >/dev/null || cannot "$command is missing."
done
python=${GRPO_TPU_PYTHON:-python3.12}
prefix=$("$python" -c 'import sys; print(sys.base_prefix)') ||
  cannot "$python is missing."

tool=(
  buildah --root "$folder/storage" --runroot "$folder/runroot"
  --storage-driver "${STORAGE_DRIVER:-vfs}"
)
printf '{"default":[{"type":"insecureAcceptAnything"}]}' >"$folder/policy.json"

base=$folder/base
if [[ ! -e $base.complete ]]; then
  rm -rf "$base"
  debootstrap --variant=minbase --include=\
ca-certificates,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,\
libsqlite3-0,libssl3,libuuid1,zlib1g bookworm "$base"
  # Python looks for its libraries at the original path.
  mkdir -p "$base$prefix"
  tar -C "$prefix" --exclude=site-packages --exclude=test -c . |
    tar -C "$base$prefix" -x
  # Other users must be able to open its parent folders.
  for ((at = 1; at < ${#prefix}; at++)); do
    if [[ ${prefix:at:1} == / ]]; then chmod a+rx "$base${prefix:0:at}"; fi
  done
  ln -sf "$prefix/bin/python3.12" "$base/usr/local/bin/python"
  chroot "$base" python -m ensurepip >/dev/null
  touch "$base.complete"
fi
printf 'FROM scratch\nCOPY . /\nENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n' \
  >"$folder/Dockerfile.base"
"${tool[@]}" bud --quiet --signature-policy "$folder/policy.json" \
  --tag localhost/base --file "$folder/Dockerfile.base" "$base" >/dev/null

volumes=()
IFS=: read -ra named <<<"${IMAGE_VOLUMES:-}"
for mounted in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs ${named[@]+"${named[@]}"}; do
  if [[ -e $mounted ]]; then volumes+=(--volume "$mounted:$mounted:ro"); fi
done
"${tool[@]}" bud --signature-policy "$folder/policy.json" --isolation chroot \
  --pull-never --build-arg BASE_IMAGE=localhost/base --build-arg EXTRA= \
  "${volumes[@]}" --tag localhost/grpo_tpu "$root"

container=$("${tool[@]}" from --signature-policy "$folder/policy.json" \
  --pull-never localhost/grpo_tpu)
# A host name that resolves.
run=("${tool[@]}" run --isolation chroot --hostname localhost)
"${tool[@]}" inspect --format \
  'user {{.OCIv1.Config.User}}, entrypoint {{.OCIv1.Config.Entrypoint}}' "$container"
"${run[@]}" "$container" -- \
  python -c 'import os; assert os.getuid() == 10001, os.getuid()'
"${run[@]}" "$container" -- \
  python -m grpo_tpu.main --config=configs/smoke.py --workdir=/tmp/run \
  --config.train.num_steps=2 --config.eval.every_steps=0 \
  --config.data.synthetic.num_problems=400 --config.data.prompts_per_step=16
"${run[@]}" "$container" -- \
  python -c 'import json, pathlib
rows = pathlib.Path("/tmp/run/metrics.jsonl").read_text().splitlines()
print("steps inside the image:", [json.loads(row)["step"] for row in rows])'
