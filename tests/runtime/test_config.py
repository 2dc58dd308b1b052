"""Settings travel between dataclass, command line and resource without loss."""

from __future__ import annotations

import argparse

import pytest
from gantline_runtime.config import EngineConfig, ServerConfig, add_arguments, from_arguments, from_mapping, to_arguments
from gantline_runtime.errors import ConfigurationError


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(tp=2, session_len=4096, enable_prefix_caching=False, dtype="bfloat16", cache_max_entry_count=0.5),
        EngineConfig(eager_mode=True, num_cache_blocks=17, block_size=32),
        ServerConfig(host="0.0.0.0", served_model_name="chat", drain_timeout=7.5),
    ],
)
def test_flags_made_from_a_config_make_the_same_config(config: EngineConfig | ServerConfig) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, type(config))
    assert from_arguments(type(config), parser.parse_args(to_arguments(config))) == config


def test_dashes_and_underscores_are_both_accepted() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig)
    assert from_arguments(EngineConfig, parser.parse_args(["--session_len", "9"])).session_len == 9
    assert from_arguments(EngineConfig, parser.parse_args(["--session-len", "auto"])).session_len is None


@pytest.mark.parametrize(
    "values",
    [
        {"tp": 3}, {"tp": 0}, {"backend": "turbomind"}, {"cache_max_entry_count": 0.0}, {"cache_max_entry_count": float("nan")},
        {"block_size": 48}, {"session_len": 0}, {"max_batch_size": 0}, {"dtype": "int4"}, {"max_prefill_token_num": 0},
    ],
)  # fmt: skip
def test_an_illegal_value_is_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as error:
        from_mapping(EngineConfig, values)
    assert next(iter(values)) in str(error.value) and error.value.cure


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="sesion_len"):
        from_mapping(EngineConfig, {"sesion_len": 1})


def test_every_setting_explains_itself() -> None:
    parser = argparse.ArgumentParser()
    for cls in (EngineConfig, ServerConfig):
        add_arguments(parser, cls)
    assert "None" not in parser.format_help()
