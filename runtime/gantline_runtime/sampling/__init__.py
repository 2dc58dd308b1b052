"""From logits to tokens: parameters per request on the host, one batch of tensors a step, a fixed number of operations without waiting."""

from gantline_runtime.sampling.batch import SamplingBatch, SamplingTable, TokenMask
from gantline_runtime.sampling.sampler import SampledTokens, Sampler

__all__ = ["SampledTokens", "Sampler", "SamplingBatch", "SamplingTable", "TokenMask"]
