#!/usr/bin/env bash
# An interpreter whose grpo_tpu.main suffers the `FAULT` of tests/faults.py.
exec "${PYTHON:?}" "$(dirname "${BASH_SOURCE[0]}")/faults.py" "$@"
