"""From an admission request to its warnings: which spec is asked about, what is known of its model, and the cluster as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gantline_runtime.errors import CheckpointError
from gantline_runtime.model_facts import ModelFacts

from gantline_operator.client import Client, Object
from gantline_operator.controller import Controller
from gantline_operator.reconcile_pass import SERVICES
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.spec import SpecError, parse_spec
from gantline_operator.webhook.advice import LONGEST, advise

__all__ = ["Reviewer"]


class Reviewer:
    """Knows the cluster through the controller, which plans with the same facts, and models by what services say that use them."""

    def __init__(self, client: Client, controller: Controller, images: Mapping[str, str]) -> None:
        self._client = client
        self._controller = controller
        self._images = images

    async def judge(self, request: Object) -> list[str]:
        """Warnings on the object that is to be stored. Raises ApiError where services cannot be listed."""
        manifest = _map(request.get("object"))
        before = _map(request.get("oldObject"))
        if not manifest or manifest.get("spec") == before.get("spec") or _map(manifest.get("metadata")).get("deletionTimestamp"):
            return []
        try:
            spec = parse_spec(manifest.get("spec"))
        except SpecError as error:
            return [f"InvalidSpec: {error}"[:LONGEST]]
        namespace = str(request.get("namespace", ""))
        await self._controller.view.known()
        model = await self._model(namespace, spec)
        cluster = self._controller.facts_for(f"{namespace}/{request.get('name', '')}")
        return await asyncio.to_thread(advise, spec, model, cluster, self._images)

    async def _model(self, namespace: str, spec: InferenceServiceSpec) -> ModelFacts | None:
        """As a service of the same namespace has it in its status: others' models are nobody's business here."""
        for service in await self._client.list(SERVICES, namespace, resourceVersion="0"):
            source = _map(_map(service.get("spec")).get("model"))
            known = _map(_map(service.get("status")).get("model"))
            if known and (source.get("uri"), source.get("revision")) == (spec.model.uri, spec.model.revision):
                try:
                    return ModelFacts.from_json({key: value for key, value in known.items() if key != "inputs"})
                except CheckpointError:
                    continue
        return None


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
