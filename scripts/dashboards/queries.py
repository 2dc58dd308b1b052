"""Queries, with `{S}` for the board's selector and `[R]` for the interval of a rate."""

from __future__ import annotations

__all__ = ["narrowed", "of_all", "per_minute", "quantiles", "rate", "tokens"]


def quantiles(metric: str) -> dict[str, str]:
    return {f"p{share}": f"histogram_quantile(0.{share}, sum by (le) (rate(gantline_{metric}_bucket{{S}}[R])))" for share in (50, 95, 99)}


def rate(metric: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(gantline_{metric}{{S}}[R]))"


def per_minute(metric: str, by: str = "") -> str:
    """Of what is rare."""
    return f"60 * {rate(metric, by)}"


def narrowed(query: str, selector: str) -> str:
    """`query` with a further selector in its metric."""
    return query.replace("{S}", f"{{S, {selector}}}")


def tokens(kind: str, by: str = "") -> str:
    """As the gateways count them."""
    return narrowed(rate("gateway_tokens_total", by), f'kind="{kind}"')


def of_all(query: str) -> str:
    """The same of what belongs to no service."""
    return query.replace("{S}", "")
