"""The store of responses keeps within its bytes."""

from __future__ import annotations

from lfm_mlx.server.response_store import ResponseStore, StoredResponse


def stored(text: str) -> StoredResponse:
    return StoredResponse(body={"text": text}, messages=[{"role": "user", "content": text}])


def test_the_oldest_is_forgotten_first_and_the_latest_used_last() -> None:
    store = ResponseStore(max_bytes=800)
    for name in ("a", "b", "c"):
        store.add(name, stored(name * 100))
    assert store.get("a") is not None
    store.add("d", stored("d" * 100))
    assert [name for name in "abcd" if store.get(name) is not None] == ["a", "c", "d"]
    assert store.num_bytes <= 800
    for name in ("a", "c", "d"):
        assert store.remove(name)
        assert not store.remove(name)
    assert (store.num_bytes, len(store)) == (0, 0)


def test_one_that_is_too_large_is_not_kept() -> None:
    store = ResponseStore(max_bytes=1000)
    store.add("a", stored("a"))
    store.add("b", stored("b" * 1000))
    assert store.get("b") is None
    assert store.num_bytes <= 1000
