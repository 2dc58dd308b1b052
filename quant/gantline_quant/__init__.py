"""Quantizers, as a library and as the entry point of the quantize Job."""
