# dale-ct in a container: docs/elsewhere.md says how to build and run it. No Docker engine was there to build this image;
# tests/dale_ct/test_dockerfile.py runs its lines without one.
FROM python:3.11-slim

# PyPI's PyTorch is the CUDA build, which runs on a CPU too. https://download.pytorch.org/whl/cpu has a smaller one.
ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /source
COPY requirements.txt .
RUN python -m pip install --extra-index-url "$TORCH_INDEX" -r requirements.txt
COPY . .
RUN python -m pip install --no-deps --no-build-isolation .

# Downloaded weights: mount a volume here to keep them. Any user may write, for --user.
WORKDIR /cache
RUN chmod 1777 .
ENV HOME=/cache HF_HOME=/cache/huggingface

USER 1000:1000
WORKDIR /data
ENTRYPOINT ["dale-ct"]
