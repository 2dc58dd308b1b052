"""Triton kernels. They run on every GPU that Triton knows, and on a CPU under TRITON_INTERPRET=1: so do tests without a GPU."""

from gantline_kernels import prebuilt, triton_launcher

triton_launcher.install()
prebuilt.install()
