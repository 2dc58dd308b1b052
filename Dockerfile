# Gantline's images. Targets: operator (no torch), runtime (NVIDIA GPUs; CUDA comes with torch's wheels), runtime-cpu.
#
#   docker build --target operator    --tag REPOSITORY/operator:VERSION .
#   docker build --target runtime     --tag REPOSITORY/runtime:VERSION .
#   docker build --target runtime-cpu --tag REPOSITORY/runtime-cpu:VERSION .
#
# Layers go from what changes least to what changes most: system, pinned dependencies, the small model, our code. A change of code
# copies a few MB and rebuilds in seconds; dependencies are installed anew only when a pin changes.

ARG PYTHON=3.11.13-slim-bookworm

# --- what all images share: Python, a user without rights, no bytecode written at run time -------------------------------------------
FROM python:${PYTHON} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/gantline/venv/bin:$PATH
RUN groupadd --gid 1000 gantline && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gantline \
    && python -m venv --without-pip /opt/gantline/venv
WORKDIR /opt/gantline

# --- the code, once for all targets: a wheel without dependencies, since those are layers of their own ----------------------------------
FROM base AS wheel
COPY requirements/tools.txt requirements/
RUN pip install --requirement requirements/tools.txt
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY runtime runtime
COPY kernels kernels
COPY quant quant
COPY devcluster/gantline_devcluster devcluster/gantline_devcluster
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

# --- operator -----------------------------------------------------------------------------------------------------------------------------
FROM base AS operator-dependencies
COPY requirements/operator.txt requirements/
RUN pip --python venv/bin/python install --no-deps --requirement requirements/operator.txt

FROM operator-dependencies AS operator
COPY examples/tiny-model tiny-model
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip --python venv/bin/python install --no-deps /dist/*.whl
USER 1000:1000
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8081/healthz', timeout=2)"]
ENTRYPOINT ["gantline-operator"]

# --- runtime on a CPU -------------------------------------------------------------------------------------------------------------------------
FROM base AS runtime-cpu-dependencies
# torch is published for CPUs alone in an index of its own: name it with --build-arg TORCH_CPU_INDEX=... for an image that is 5 GB smaller.
# Without it, the default index's build is taken, with the CUDA libraries that it cannot be imported without.
ARG TORCH_CPU_INDEX=
COPY requirements/runtime.txt requirements/
RUN if [ -n "$TORCH_CPU_INDEX" ]; then \
      grep -E '^torch==' requirements/runtime.txt > requirements/torch.txt \
      && grep -vE '^(torch|triton|nvidia-|cuda-)' requirements/runtime.txt > requirements/rest.txt \
      && pip --python venv/bin/python install --no-deps --index-url "$TORCH_CPU_INDEX" --requirement requirements/torch.txt \
      && pip --python venv/bin/python install --no-deps --requirement requirements/rest.txt; \
    else \
      pip --python venv/bin/python install --no-deps --requirement requirements/runtime.txt; \
    fi

FROM runtime-cpu-dependencies AS runtime-cpu
COPY examples/tiny-model tiny-model
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip --python venv/bin/python install --no-deps /dist/*.whl
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["gantline"]
CMD ["--help"]

# --- the CUDA kernels: machine code for each architecture, made without a GPU; compiler and sources are layers of their own -----------------
FROM base AS kernels
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /kernels
ENV GANTLINE_CACHE=/kernels/cache
COPY kernels/gantline_kernels/build.py ./
RUN python -c "import build; print(build.fetch_toolkit())"
COPY kernels/gantline_kernels/cuda_kernels cuda_kernels
RUN python build.py --output /out/libgantline_kernels.so

# --- runtime on NVIDIA GPUs: the driver comes from the node, everything else from the wheels ----------------------------------------------
FROM base AS runtime-dependencies
# Triton compiles its launchers with a C compiler when a kernel is first used.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements/runtime.txt requirements/
RUN pip --python venv/bin/python install --no-deps --requirement requirements/runtime.txt

FROM runtime-dependencies AS runtime
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility CC=gcc GANTLINE_KERNELS_LIBRARY=/opt/gantline/libgantline_kernels.so
COPY --from=kernels /out/libgantline_kernels.so ./
COPY examples/tiny-model tiny-model
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip --python venv/bin/python install --no-deps /dist/*.whl
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["gantline"]
CMD ["--help"]
