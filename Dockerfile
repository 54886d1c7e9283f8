# The program with its pinned set, for a TPU host. Nothing of Google's or of
# MathVista's is inside: weights and data are mounted.
#
#   docker build -t grpo_tpu .
#   docker run --privileged --net=host --volume DIR:DIR grpo_tpu \
#     --config=configs/smoke.py --workdir=DIR
#
# `launch/tpu.sh` runs it on every worker of a slice, and on GKE; a bucket is
# mounted, and DIR a folder in it (docs/on-a-pod.md).
#
# With `--build-arg EXTRAS=` (no extra) the image is one for CPUs.
ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE}

ARG EXTRAS=[tpu]
WORKDIR /opt/grpo_tpu
ENV PIP_NO_CACHE_DIR=1 \
  PIP_DISABLE_PIP_VERSION_CHECK=1 \
  PYTHONUNBUFFERED=1 \
  TF_CPP_MIN_LOG_LEVEL=3

# The pinned set first: a layer that a change of the code leaves alone.
COPY setup.py constraints.txt ./
RUN python -m pip install --constraint constraints.txt setuptools wheel \
  && python -m pip install --constraint constraints.txt \
    --no-build-isolation ".${EXTRAS}"

# Then the code, which runs from here: `configs` is no installed package.
COPY data_pipelines data_pipelines
COPY grpo_tpu grpo_tpu
COPY configs configs
COPY LICENSE README.md ./

RUN useradd --create-home --uid 10001 grpo
USER 10001
ENTRYPOINT ["python", "-m", "grpo_tpu.main"]
