# The program with its pinned dependencies, for a TPU host. The image contains no
# Gemma weights and no MathVista data: these are in a bucket.
#
#   docker build -t grpo_tpu .
#   docker run --privileged --net=host --ulimit memlock=-1 --init grpo_tpu \
#     --config=configs/smoke.py --workdir=gs://BUCKET/RUN
#
# `launch/tpu.sh` runs the image on every worker of a slice or on GKE
# (docs/on-a-pod.md).
#
# `--build-arg EXTRA=` (no extra) makes an image for CPUs.
#
# The digest is that of the tag's index, for all machines; the Docker library's
# repo-info lists both. Change tag, digest and the version in
# launch/pod/worker.sh together.
ARG BASE_IMAGE=python:3.12.14-slim-bookworm@sha256:0f5b26b9518d002b6173fd61daad821fa340635ebfec5bba471013f9ca114579
FROM ${BASE_IMAGE}

ARG EXTRA=tpu
WORKDIR /opt/grpo_tpu
ENV PIP_NO_CACHE_DIR=1 \
  PIP_DISABLE_PIP_VERSION_CHECK=1 \
  PYTHONUNBUFFERED=1 \
  TPU_LOG_DIR=disabled \
  TF_CPP_MIN_LOG_LEVEL=3

# The dependencies come first, so that a change of the code keeps their layer.
# pip installs only files whose SHA-256 is in the locks, which are complete. Of all
# packages, only promise has no wheel.
COPY locks locks
RUN python -m pip install --require-hashes --only-binary :all: \
    --requirement locks/build.txt \
  && python -m pip install --no-deps --require-hashes --only-binary :all: \
    --no-binary promise --no-build-isolation \
    --requirement locks/base.txt ${EXTRA:+--requirement "locks/$EXTRA.txt"}

# The code runs from this folder, because `configs` is not an installed package.
COPY data_pipelines data_pipelines
COPY grpo_tpu grpo_tpu
COPY configs configs
COPY LICENSE README.md ./

RUN useradd --create-home --uid 10001 grpo
USER 10001
ENTRYPOINT ["python", "-m", "grpo_tpu.main"]
