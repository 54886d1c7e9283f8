#!/usr/bin/env bash
# `PYTHON`, but for that grpo_tpu.main suffers the `FAULT` of tests/faults.py.
if [[ $1 == -m ]]; then
  set -- "$(dirname "${BASH_SOURCE[0]}")/faults.py" "$@"
fi
exec "${PYTHON:?}" "$@"
