"""Endpoints: one row a name, and one pointer that moves."""

from __future__ import annotations

import pytest

from llmo.errors import NotFoundError


def test_an_endpoint_is_set_read_and_removed(store, new_job) -> None:
    job = new_job(service=True)
    made = store.endpoints.set("news", job=job.id, model="sha256:1", model_ref="m@1", task="text-classification")
    assert (made.state, made.job, made.address) == ("starting", job.id, None)
    assert store.endpoints.get("news") == made
    assert store.endpoints.list() == [made]
    store.endpoints.remove("news")
    assert store.endpoints.list() == []
    for call in (store.endpoints.get, store.endpoints.remove):
        with pytest.raises(NotFoundError):
            call("news")


def test_setting_again_replaces_all_but_its_age(store, new_job) -> None:
    first = store.endpoints.set("news", job=new_job().id, model="sha256:1", engine="onnx", address="unix:/a")
    second = store.endpoints.set("news", job=None, model="sha256:2", state="down")
    assert (second.job, second.model, second.engine, second.address, second.state) == (
        None,
        "sha256:2",
        "",
        None,
        "down",
    )
    assert second.created_at == first.created_at
    assert len(store.endpoints.list()) == 1


def test_point_moves_the_pointer_and_what_goes_with_it(store, new_job) -> None:
    old, new = new_job(), new_job()
    store.endpoints.set(
        "news", job=old.id, model="sha256:1", model_ref="m@1", engine="onnx", state="up", address="unix:/a"
    )
    moved = store.endpoints.point("news", new.id, model="sha256:2", model_ref="m@2", address="unix:/b")
    assert moved == store.endpoints.get("news")
    assert (moved.job, moved.model, moved.model_ref, moved.address) == (new.id, "sha256:2", "m@2", "unix:/b")
    assert (moved.engine, moved.state) == ("onnx", "up")


def test_point_refuses_unknown_names_and_fields(store) -> None:
    store.endpoints.set("news", job=None, model="sha256:1")
    with pytest.raises(NotFoundError, match="did you mean 'news'"):
        store.endpoints.point("new", None)
    with pytest.raises(TypeError, match="colour"):
        store.endpoints.point("news", None, colour="red")
