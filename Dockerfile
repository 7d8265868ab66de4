# Everything that a run needs, compilers included, since DeepSpeed and Triton compile when they are first used.
#
#   docker build -t zi_experiments .
#   docker run --rm --gpus all --shm-size=1g --ulimit memlock=-1 -v "$PWD/outputs:/home/zi/outputs" zi_experiments model=opt-1.3b
#
# /home/zi/outputs has to be writable for user 1000. offload=nvme needs a disk: -v /mnt/nvme:/mnt/nvme offload.path=/mnt/nvme.
# Without a GPU leave out --gpus all.

# devel has nvcc. Its CUDA has to be of the same major version as that of torch in constraints.txt.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ libaio-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

WORKDIR /opt/zi_experiments
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY zi_experiments zi_experiments
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c constraints.txt .

# Ubuntu's image has a user 1000 of its own
RUN userdel --remove ubuntu 2>/dev/null; \
    useradd --uid 1000 --create-home zi \
    && install -d -o zi -g zi /home/zi/outputs
USER zi
WORKDIR /home/zi

ENTRYPOINT ["python", "-m", "zi_experiments"]
