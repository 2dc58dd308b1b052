# Gantline's images. Targets: operator (the gateway too; no torch), runtime (NVIDIA GPUs; CUDA comes with torch's wheels), runtime-cpu.
#
#   docker build --target operator    --tag REPOSITORY/operator:VERSION .
#   docker build --target runtime     --tag REPOSITORY/runtime:VERSION .
#   docker build --target runtime-cpu --tag REPOSITORY/runtime-cpu:VERSION .
#
# Layers go from what changes least to what changes most: system, pinned dependencies, the small model, our code. A change of code
# copies a few MB and rebuilds in seconds; dependencies are installed anew only when a pin changes.

ARG PYTHON=3.11.13-slim-bookworm

# --- what all images share: Python, a user without rights, no bytecode written at run time -------------------------------------------
# The published base has Python's own modules as sources alone, which every process of every start would compile: a second of a server's.
FROM python:${PYTHON} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    PATH=/opt/gantline/venv/bin:$PATH
RUN groupadd --gid 1000 gantline && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin gantline \
    && python -m venv --without-pip /opt/gantline/venv \
    && python -m compileall -q --invalidation-mode unchecked-hash -x '/(ensurepip|idlelib|lib2to3|site-packages|tests?|tkinter|turtledemo)/' \
       "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
WORKDIR /opt/gantline

# --- the code, once for all targets: our own packages in an otherwise empty environment, which is laid over that of the dependencies ------
# (A COPY, not a RUN that mounts this stage: buildah would take that RUN from its cache although the code has changed.)
FROM base AS code
COPY requirements/tools.txt requirements/
RUN pip install --requirement requirements/tools.txt
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY runtime runtime
COPY kernels kernels
COPY quant quant
COPY devcluster/gantline_devcluster devcluster/gantline_devcluster
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && pip --python /opt/gantline/venv/bin/python install --no-deps /dist/*.whl

# --- operator -----------------------------------------------------------------------------------------------------------------------------
FROM base AS operator-dependencies
COPY requirements/operator.txt requirements/
RUN pip --python venv/bin/python install --no-deps --requirement requirements/operator.txt

FROM operator-dependencies AS operator
COPY --from=code /opt/gantline/venv venv
USER 1000:1000
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8081/healthz', timeout=2)"]
ENTRYPOINT ["gantline-operator"]

# --- runtime on a CPU -------------------------------------------------------------------------------------------------------------------------
FROM base AS torch-for-cpus
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# torch is published for CPUs alone in an index of its own: name it with --build-arg TORCH_CPU_INDEX=... where you can reach it. Without it,
# the default index's build is taken, and the CUDA libraries that it is linked with are replaced by stubs.
ARG TORCH_CPU_INDEX=
COPY requirements/runtime.txt requirements/
COPY scripts/leave_out_cuda.py ./
RUN if [ -n "$TORCH_CPU_INDEX" ]; then \
      grep -E '^torch==' requirements/runtime.txt > requirements/torch.txt \
      && grep -vE '^(torch|triton|nvidia-|cuda-)' requirements/runtime.txt > requirements/rest.txt \
      && pip --python venv/bin/python install --no-deps --index-url "$TORCH_CPU_INDEX" --requirement requirements/torch.txt \
      && pip --python venv/bin/python install --no-deps --requirement requirements/rest.txt; \
    else \
      grep -vE '^(triton|cuda-)' requirements/runtime.txt > requirements/rest.txt \
      && pip --python venv/bin/python install --no-deps --requirement requirements/rest.txt \
      && python leave_out_cuda.py venv/lib/python3.*/site-packages; \
    fi

FROM base AS runtime-cpu-dependencies
COPY --from=torch-for-cpus /opt/gantline/venv venv

FROM runtime-cpu-dependencies AS runtime-cpu
# For torch, parts of which ask for the user's name when they are imported: a number that no file knows has none.
ENV USER=gantline
COPY examples/tiny-model tiny-model
COPY --from=code /opt/gantline/venv venv
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
COPY requirements/runtime.txt requirements/
RUN pip --python venv/bin/python install --no-deps --requirement requirements/runtime.txt

# Triton compiles C when a kernel is first launched. The image has no compiler: what would be compiled there is built here.
FROM runtime-dependencies AS triton-launcher
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY kernels/gantline_kernels/triton_launcher.py kernels/gantline_kernels/triton_launcher.c ./
RUN venv/bin/python triton_launcher.py --output /out/triton-launcher

# Triton's kernels for the models that are served most, compiled without a GPU; others are compiled where they are met. Fewer architectures
# or models make a quicker build: --build-arg KERNEL_TARGETS="90" --build-arg KERNEL_MODELS="llama-3.1-8b" (empty: all of the list).
# Our code decides which kernels there are, so this step follows each change of it; the builder's cache keeps it from compiling all anew.
FROM runtime-dependencies AS triton-kernels
ARG KERNEL_TARGETS="80 86 89 90"
ARG KERNEL_MODELS=
COPY runtime/gantline_runtime source/gantline_runtime
COPY kernels/gantline_kernels source/gantline_kernels
# hadolint ignore=DL3059,SC2086
RUN --mount=type=cache,target=/var/cache/triton-kernels PYTHONPATH=source python -m gantline_runtime.cli prebuild-kernels \
    --targets $KERNEL_TARGETS --models $KERNEL_MODELS --reuse /var/cache/triton-kernels --out /out/triton-kernels

FROM runtime-dependencies AS runtime
ENV USER=gantline NVIDIA_DRIVER_CAPABILITIES=compute,utility GANTLINE_KERNELS_LIBRARY=/opt/gantline/libgantline_kernels.so \
    GANTLINE_TRITON_LAUNCHER=/opt/gantline/triton-launcher GANTLINE_TRITON_KERNELS=/opt/gantline/triton-kernels
COPY --from=kernels /out/libgantline_kernels.so ./
COPY --from=triton-launcher /out/triton-launcher triton-launcher
COPY --from=triton-kernels /out/triton-kernels triton-kernels
COPY examples/tiny-model tiny-model
COPY --from=code /opt/gantline/venv venv
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["gantline"]
CMD ["--help"]
