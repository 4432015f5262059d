"""What endpoints are asked by: ENDPOINT, ENDPOINT:ADAPTER, and the version NAME@VERSION of either."""

from __future__ import annotations

from collections.abc import Iterable

from llmo.types import Adapter, Endpoint

Meaning = tuple[str, str | None]  # an endpoint, and its adapter if it is one


def split(name: str) -> Meaning:
    """ENDPOINT or ENDPOINT:ADAPTER taken apart, as it is written."""
    endpoint, colon, adapter = name.partition(":")
    return endpoint, adapter if colon else None


def meanings(endpoints: Iterable[Endpoint], adapters: Iterable[Adapter]) -> dict[str, Meaning]:
    """All names, of adapters that answer now. A version that several serve means the first; a name goes before it."""
    named: dict[str, Meaning] = {}
    versions: dict[str, Meaning] = {}
    for endpoint in endpoints:
        named[endpoint.name] = (endpoint.name, None)
        versions.setdefault(endpoint.model_ref, named[endpoint.name])
    for adapter in adapters:
        if adapter.answers:
            name = f"{adapter.endpoint}:{adapter.name}"
            named[name] = (adapter.endpoint, adapter.name)
            versions.setdefault(adapter.model_ref, named[name])
    return {**versions, **named}
