"""The webhook as a whole: its server, what it answers, and its certificate."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from functools import partial

from gantline_operator.background import beside
from gantline_operator.certificates.pairs import load_pair
from gantline_operator.certificates.trust import trust_of_webhooks
from gantline_operator.certificates.upkeep import Upkeep
from gantline_operator.client import Client
from gantline_operator.controller import Controller
from gantline_operator.settings import OperatorSettings
from gantline_operator.web import serving_http
from gantline_operator.webhook.judge import Reviewer
from gantline_operator.webhook.server import build_admission

__all__ = ["serving_webhook"]


@contextlib.asynccontextmanager
async def serving_webhook(
    settings: OperatorSettings, client: Client, controller: Controller, leads: Callable[[], bool], stop: asyncio.Event
) -> AsyncIterator[None]:
    """In every replica; who leads also renews the certificate. A failure of ours that is no ApiError sets `stop` and is raised."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trust = trust_of_webhooks(settings.webhook_configuration)
    upkeep = Upkeep(client, settings.webhook_secret, trust, settings.webhook_hosts, partial(load_pair, context), leads)
    judge = Reviewer(client, controller, settings.images).judge

    def count(result: str) -> None:
        controller.metrics.reviews.labels(result).inc()

    application = build_admission(judge, count)
    async with serving_http(application, settings.listen_address, settings.webhook_port, context), beside(upkeep.run(), stop):
        yield
