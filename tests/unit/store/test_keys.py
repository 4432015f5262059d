"""API keys: found by their secret, which is kept nowhere."""

from __future__ import annotations

import re

import pytest

from llmo.errors import InputError, NotFoundError


def test_a_key_is_found_by_its_secret_only(store) -> None:
    key, secret = store.keys.create("ann", "admin")
    other, _ = store.keys.create("bob", "predict")
    assert re.fullmatch(r"llmo_[A-Za-z0-9_-]{43}", secret)
    assert store.keys.find(secret) == key
    assert store.keys.list() == [key, other]
    for wrong in ("", "llmo_", secret[:-1], secret + "a", secret[5:], key.id, "llmo_\ud800", "llmo_\0"):
        assert store.keys.find(wrong) is None


def test_the_secret_is_nowhere_in_the_home(store, home) -> None:
    _, secret = store.keys.create("ann", "admin")
    for path in home.rglob("*"):
        if path.is_file():
            assert secret[5:].encode() not in path.read_bytes()


def test_a_revoked_key_opens_nothing(store) -> None:
    key, secret = store.keys.create("ann", "member")
    store.keys.revoke(key.id)
    assert store.keys.find(secret) is None
    [kept] = store.keys.list()
    assert kept.revoked_at is not None
    store.keys.revoke(key.id)
    assert store.keys.list() == [kept]


def test_wrong_roles_and_unknown_keys_are_errors(store) -> None:
    with pytest.raises(InputError, match="root"):
        store.keys.create("ann", "root")
    with pytest.raises(NotFoundError):
        store.keys.revoke("key_0")
    assert store.keys.list() == []
