# syntax=docker/dockerfile:1
# NVIDIA's image brings torch, torchvision, DALI and apex that were built for each other; what is added here leaves
# them as they are, and the build fails where it does not. 26.07: Python 3.12, torch 2.13, CUDA 13.3.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/moco-fast

# The dependencies come before the sources, so that a change of the sources does not install them again.
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY deploy/base_image.py deploy/
RUN python deploy/base_image.py plan /opt/moco-fast/base \
    && python -m pip install --no-cache-dir --break-system-packages \
        --constraint base/constraints.txt --requirement base/requirements.txt

# PIP_CONSTRAINT is the base's own list; it would also bind the throw-away environment that builds the wheel.
COPY shards shards
COPY pipelines pipelines
COPY moco_fast moco_fast
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --break-system-packages --no-deps . \
    && python deploy/base_image.py check /opt/moco-fast/base \
    && make-shards --help >/dev/null && moco-fast --help >/dev/null && python -m moco_fast.train --help >/dev/null

# Relative paths of the README work here: configs/accelerate/*.yaml to read, anything else to write.
RUN useradd --create-home --uid 10001 moco && install --directory --owner moco /moco
COPY --chown=moco configs /moco/configs
USER 10001
WORKDIR /moco

# `video` brings the GPU's JPEG engines into the container.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="moco-fast" \
    org.opencontainers.image.description="Pretrain image encoders with Momentum Contrast: shards in, encoder out." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# The entry point stays NVIDIA's, which runs what it is given: make-shards, moco-fast, accelerate launch, bash.
CMD ["moco-fast", "--help"]
