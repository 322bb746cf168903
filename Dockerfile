# An image for GPU nodes: docker build -t ponder-scale .   Slurm's pyxis and apptainer take it, too (slurm/README.md).
# The compiler and nvcc stay inside: DeepSpeed compiles its operators when they are first used, and wants the CUDA that
# torch was built with.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# the packages change seldom: a layer of their own
WORKDIR /opt/ponder-scale
COPY requirements.lock requirements-torch.txt ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock \
    && pip install --no-cache-dir -r requirements-torch.txt

COPY . .
RUN pip install --no-cache-dir --no-deps .

WORKDIR /work
CMD ["ponder-scale", "--help"]
