# The program with its pinned dependencies, for a TPU host. The image contains no
# Gemma weights and no MathVista data: these are mounted.
#
#   docker build -t grpo_tpu .
#   docker run --privileged --net=host --volume DIR:DIR grpo_tpu \
#     --config=configs/smoke.py --workdir=DIR
#
# `launch/tpu.sh` runs the image on every worker of a slice or on GKE, with DIR in
# a mounted bucket (docs/on-a-pod.md).
#
# `--build-arg EXTRAS=` (no extra) makes an image for CPUs.
ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE}

ARG EXTRAS=[tpu]
WORKDIR /opt/grpo_tpu
ENV PIP_NO_CACHE_DIR=1 \
  PIP_DISABLE_PIP_VERSION_CHECK=1 \
  PYTHONUNBUFFERED=1 \
  TF_CPP_MIN_LOG_LEVEL=3

# The dependencies come first, so that a change of the code keeps their layer.
COPY setup.py constraints.txt ./
RUN python -m pip install --constraint constraints.txt setuptools wheel \
  && python -m pip install --constraint constraints.txt \
    --no-build-isolation ".${EXTRAS}"

# The code runs from this folder, because `configs` is not an installed package.
COPY data_pipelines data_pipelines
COPY grpo_tpu grpo_tpu
COPY configs configs
COPY LICENSE README.md ./

RUN useradd --create-home --uid 10001 grpo
USER 10001
ENTRYPOINT ["python", "-m", "grpo_tpu.main"]
