"""Which services there are, what they are called, and which replicas answer for them. Pure: a catalog never changes, it is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from gantline_runtime.server.api_error import ApiError

__all__ = ["DEFAULT_STARTUP_S", "Catalog", "Replica", "Service", "everyone"]

DEFAULT_STARTUP_S = 60.0
"""What a start is taken to last where nobody has measured or predicted one."""

_MOST_NAMED = 20
"""Names in an error; more would not be read."""


@dataclass(frozen=True)
class Replica:
    """One server. `identity` stays the same for as long as its cache does: a pod's name, or an address."""

    identity: str
    address: str
    port: int
    ready: bool = True
    serving: bool = True
    """Answers, though perhaps it is about to go."""
    terminating: bool = False

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Service:
    """One model under one name. Times are seconds."""

    namespace: str
    name: str
    served_name: str = ""
    """What its replicas call the model; empty: `name`."""
    replicas: tuple[Replica, ...] = ()
    wanted: int = 1
    """Replicas that the spec asks for."""
    suspended: bool = False
    wakes: bool = True
    """Whether somebody starts it from zero when a request waits."""
    startup_s: float = DEFAULT_STARTUP_S
    """From the wish for a replica to its first answer: measured, else predicted."""
    trouble: str = ""
    """Why it is not ready, in the operator's word; empty where it is, or nobody knows."""
    created: int = 0
    """Unix time."""
    session_len: int | None = None
    """Longest session in tokens; None where nobody has decided it yet."""

    @property
    def key(self) -> str:
        """`namespace/name`: by this, metrics and demand know it, and clients where the served name is not enough."""
        return f"{self.namespace}/{self.name}"

    @property
    def model(self) -> str:
        return self.served_name or self.name

    @cached_property
    def usable(self) -> tuple[Replica, ...]:
        """Replicas to send requests to: those that are ready, else those that are about to go and still answer."""
        ready = tuple(replica for replica in self.replicas if replica.ready and not replica.terminating)
        return ready or tuple(replica for replica in self.replicas if replica.serving and replica.terminating)


def everyone(service: Service) -> bool:
    return True


@dataclass(frozen=True)
class Catalog:
    services: tuple[Service, ...] = ()
    _by_name: Mapping[str, tuple[Service, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names: dict[str, list[Service]] = {}
        for service in self.services:
            for name in {service.key, service.model}:
                names.setdefault(name, []).append(service)
        object.__setattr__(self, "_by_name", {name: tuple(found) for name, found in names.items()})

    @classmethod
    def of(cls, services: Iterable[Service]) -> Catalog:
        return cls(tuple(sorted(services, key=lambda service: (service.namespace, service.name))))

    def find(self, key: str) -> Service | None:
        """The service `namespace/name`."""
        return next((service for service in self._by_name.get(key, ()) if service.key == key), None)

    def resolve(self, model: str, visible: Callable[[Service], bool] = everyone) -> Service:
        """The service that a request means by `model`, of those that are `visible` to it. Raises ApiError: 403 where there are
        only others, 404 where there is none, 400 for a name that several have; the latter two name the choices."""
        named = self._by_name.get(model, ())
        found = [service for service in named if visible(service)]
        if named and not found:
            raise ApiError(403, f"This API key may not use the model {model[:200]!r}.", code="model_not_allowed", param="model")
        exact = [service for service in found if service.key == model]
        if len(found) == 1 or exact:
            return (exact or found)[0]
        if found:
            choices = _listed(service.key for service in found)
            message = f"The model {model[:200]!r} is served by several services. Ask for one of {choices}."
            raise ApiError(400, message, code="ambiguous_model", param="model")
        names = _listed(self.public_names(visible))
        known = f"There are: {names}." if names else "There are none for you here."
        raise ApiError(404, f"The model {model[:200]!r} does not exist here. {known}", code="model_not_found", param="model")

    def public_names(self, visible: Callable[[Service], bool] = everyone) -> dict[str, Service]:
        """Under what each visible service is asked for: its served name, or `namespace/name` where others have that name too."""
        seen = [service for service in self.services if visible(service)]
        count: dict[str, int] = {}
        for service in seen:
            count[service.model] = count.get(service.model, 0) + 1
        return {service.model if count[service.model] == 1 else service.key: service for service in seen}


def _listed(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    rest = len(listed) - _MOST_NAMED
    return ", ".join(listed[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
