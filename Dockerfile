# syntax=docker/dockerfile:1
# NVIDIA's image brings torch, torchvision, DALI and apex that were built for each other; what is added here leaves
# them as they are, and the build fails where it does not. 26.09: Python 3.12, torch 2.14, CUDA 13.4, for x86-64 and
# Arm. The digest is that of the tag when it was chosen; docs/docker.md has those of the other bases that work.
ARG BASE=nvcr.io/nvidia/pytorch:26.09-py3@sha256:6e8ccc607fc2a51e3741667b86316a0889418ba8b78ed0ba96e8d282b648a7a6
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/moco-fast

# The dependencies come before the sources, so that a change of the sources does not install them again.
COPY pyproject.toml requirements.lock ./
COPY deploy/docker/base_image.py deploy/docker/
RUN python deploy/docker/base_image.py install base.json

# PIP_CONSTRAINT is the base's own list; it would also bind the throw-away environment that builds the wheel.
COPY LICENSE ./
COPY shards shards
COPY pipelines pipelines
COPY moco_fast moco_fast
RUN PIP_CONSTRAINT='' python -m pip install --quiet --root-user-action ignore --no-cache-dir \
        --break-system-packages --no-deps . \
    && python deploy/docker/base_image.py check base.json \
    && make-shards --help >/dev/null && moco-fast --help >/dev/null && python -m moco_fast.train --help >/dev/null

# Relative paths of the README work in /moco: deploy/accelerate/*.yaml to read, anything else to write. Caches are in
# the home directory, which is anyone's to write: --user can be another, and a read-only container mounts a volume there.
RUN useradd --no-create-home --home-dir /var/cache/moco --uid 10001 moco \
    && install --directory --mode 1777 /var/cache/moco && install --directory --owner moco /moco
COPY --chown=moco moco_fast/launch /moco/deploy/accelerate
USER 10001
WORKDIR /moco

# "video" brings the driver's library for the JPEG engines; without it, the cores of the GPU decode. torch.compile
# loads what it builds as a library, which a temporary file system of Docker's does not allow.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    HOME=/var/cache/moco \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/moco/torchinductor

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="moco-fast" \
    org.opencontainers.image.description="Pretrain image encoders with Momentum Contrast: shards in, encoder out." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# The entry point stays NVIDIA's, which runs what it is given: make-shards, moco-fast, accelerate launch, bash.
CMD ["moco-fast", "--help"]
