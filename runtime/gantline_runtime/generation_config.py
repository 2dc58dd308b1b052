"""How answers are chosen, for use from Python and from the terminal; names and defaults are LMDeploy's. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from gantline_runtime.errors import ConfigurationError

__all__ = ["GenerationConfig"]


@dataclass(frozen=True)
class GenerationConfig:
    """Values left at None are the model's own (generation_config.json), else the ones that change nothing."""

    max_new_tokens: int = 512
    do_sample: bool = False
    """False: always the likeliest token, whatever stands below."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    random_seed: int | None = None
    stop_words: tuple[str, ...] = ()
    """Texts of any length before which an answer ends."""
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of so many of its likeliest rivals, 0 to 20; None: none."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature is None or 0 <= self.temperature <= 2, "a number from 0 to 2"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 or more"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty is None or 0.01 <= self.repetition_penalty <= 10, "a number from 0.01 to 10"),
            ("stop_words", not isinstance(self.stop_words, str) and all(self.stop_words), "a list of texts that are not empty"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20"),
        )
        for name, ok, expected in checks:
            if not ok:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}, which is not allowed", cure=f"Give {expected}.")
