# The project with what `make setup` installs, for a CPU or for NVIDIA's GPUs (CUDA and NCCL come with torch):
#
#   docker build --tag lmscripts .
#   docker build --tag lmscripts:cuda --build-arg DEVICE=cuda .
#   docker run --rm --volume "$PWD:/work" lmscripts train_tokenizer --input_file corpus.txt --model_dir tokenizer
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" lmscripts:cuda launch run_pretraining ...
#
# What stands after the image are the words of `lmscripts`; --entrypoint bash looks around. Who the container works as,
# and so who owns what it writes, is 1000:1000, or whom --user "$(id -u):$(id -g)" says.
FROM python:3.12-slim-bookworm

# torch.compile calls a compiler; nothing else is built.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 user \
    && mkdir /lmscripts /work \
    && chown user:user /lmscripts /work
USER 1000:1000
WORKDIR /lmscripts
# hadolint ignore=DL3064
ENV PATH=/lmscripts/.venv/bin:$PATH LC_ALL=C.UTF-8 TOKENIZERS_PARALLELISM=false

# As in the Makefile, torch first: nothing later replaces it. A change of the code installs none of this again.
COPY --chown=1000:1000 requirements.txt ./
# cpu, or cuda: then torch is the build of the Python Package Index.
ARG DEVICE=cpu
# hadolint ignore=DL3013
RUN python -m venv .venv \
    && case "$DEVICE" in \
        cpu) set -- --index-url https://download.pytorch.org/whl/cpu ;; \
        cuda) set -- ;; \
        *) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 2 ;; \
    esac \
    && python -m pip install --no-cache-dir "$@" "$(grep '^torch==' requirements.txt)" \
    && python -m pip install --no-cache-dir --requirement requirements.txt

COPY --chown=1000:1000 . .
RUN python -m pip install --no-cache-dir --no-deps --editable . \
    && lmscripts --version

# Where the caller's folder is mounted, and a home that any user can write caches to.
WORKDIR /work
ENV HOME=/tmp
ENTRYPOINT ["lmscripts"]
CMD ["--help"]
