"""Layers that are on their way, without a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.cache_utils import (  # noqa: E402
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import kvtc_stream as kvtc  # noqa: E402
from kvtc_stream.integrations.transformers.arriving import (  # noqa: E402
    Arrivals,
    Coming,
    Room,
    expect,
)
from kvtc_stream.integrations.transformers.model import attention_layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_layers_that_are_on_their_way() -> None:
    """They are waited for when they are read, in whatever way, and then as any others."""
    k, v = torch.randn(4, 1, 2, 12, 4), torch.randn(4, 1, 2, 12, 4)
    made = [tuple(x[i, :, :, :5].clone() for x in (k, v)) for i in range(4)]
    arrived: list[int] = []

    def steps() -> Iterator[None]:
        for i in range(2):
            arrived.append(i)
            yield

    def pending(window: int = 0) -> Any:
        arrived.clear()
        cache = DynamicCache()
        arrivals, room = Arrivals(steps()), Room(k, v, 5)
        for i in range(4):
            layer = DynamicSlidingWindowLayer(window) if window else DynamicLayer()
            layer.lazy_initialization(*made[i])
            layer.cumulative_length = 5
            wait = partial(arrivals.wait, i // 2)
            expect(layer, Coming(room, i, wait, lambda x: x, True))
            cache.layers.append(layer)
        return cache

    cache = pending()
    assert not arrived
    assert cache.get_seq_length() == 5
    assert not arrived
    keys, values = cache.update(made[0][0], made[0][1], 3)
    assert arrived == [0, 1]
    assert torch.equal(keys[:, :, :5], made[3][0])
    assert torch.equal(values[:, :, 5:], made[0][1])
    assert type(cache.layers[3]) is DynamicLayer
    cache = pending()
    copied = copy.deepcopy(cache)
    assert arrived == [0, 1]
    for own in (copied, cache):
        for layer, pair in zip(own.layers, made, strict=True):
            assert type(layer) is DynamicLayer
            assert torch.equal(layer.keys, pair[0])
            assert torch.equal(layer.values, pair[1])
    cache = pending()
    cache.reset()
    cache.layers[1].update(*made[2])
    assert torch.equal(cache.layers[1].values, made[2][1])
    assert set(attention_layers(cache, "it")) == {0, 1, 2, 3}
    cache = pending(window=4)
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer)
    assert cache.get_seq_length() == 5
    assert not arrived
    assert cache.update(*made[1], 0)[0].shape[2] == 10
    assert not hasattr(cache.layers[3], "something")
    cache.layers[2].keys = made[0][0]
    assert torch.equal(cache.layers[2].values, made[2][1])
    assert cache.layers[2].keys is made[0][0]


def test_tokens_that_are_added_to_layers_on_their_way() -> None:
    """The first follow those that have come, without a copy, where they can; as any others where
    they cannot: what they are never differs."""

    def layer(k: torch.Tensor, moved: Any = None) -> Any:
        found, v = DynamicLayer(), k if k.is_inference() else k.clone()
        found.lazy_initialization(k, v)
        rooms.append(v)
        return expected(found, Room(k[None], v[None], 5), 0, moved)

    def expected(found: Any, where: Room, index: int = 0, moved: Any = None) -> Any:
        expect(found, Coming(where, index, lambda: None, moved or (lambda x: x), moved is None))
        return found

    room, new = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 3, 4)
    held, rooms = room[:, :, :5].clone(), [room]

    def inside(x: torch.Tensor) -> bool:
        return x.untyped_storage().data_ptr() in {y.untyped_storage().data_ptr() for y in rooms}

    def checked(own: Any, more: torch.Tensor, copied: bool, before: torch.Tensor = held) -> None:
        kind = torch.promote_types(before.dtype, more.dtype)
        for x in own.update(more, more):
            assert torch.equal(x, torch.cat([before, more.detach()], -2).to(kind))
            assert inside(x) is not copied
        assert type(own) is DynamicLayer
        assert own.get_seq_length() == before.shape[2] + more.shape[2]

    grown = layer(room)
    checked(grown, new, copied=False)
    assert torch.equal(room[:, :, 5:], new)
    checked(grown, new[:, :, :1], copied=True, before=grown.keys.clone())  # once only
    checked(layer(room), torch.randn(2, 2, 4, 4), copied=True)  # more than there is room for
    checked(layer(room), new.double(), copied=True)
    checked(layer(room), new.clone().requires_grad_(), copied=True)
    with torch.no_grad():
        checked(layer(room), new.clone().requires_grad_(), copied=False)
    double = held.double()
    for more in (new, new.double()):  # the layer holds another type than comes
        checked(layer(room, lambda x: x.double()), more, copied=True, before=double)
    with torch.inference_mode():
        inferred = torch.empty(2, 2, 8, 4)
        inferred[:, :, :5] = held
    checked(layer(inferred), new, copied=True)
    with torch.inference_mode():
        assert torch.equal(layer(inferred).update(new, new)[0][:, :, 5:], new)
        assert torch.equal(inferred[:, :, 5:], new)
    for use in (copy.copy, copy.deepcopy, lambda own: own.keys):  # others may see it then
        used = layer(room)
        use(used)
        checked(used, new, copied=True)
    replaced = layer(room)
    replaced.keys = replaced.values = new
    assert replaced.get_seq_length() == 3
    checked(replaced, new, copied=True, before=new)
    halved = layer(room)
    halved.values = new
    assert torch.equal(halved.update(new, new)[1], torch.cat([new, new], -2))
    assert torch.equal(halved.keys, torch.cat([held, new], -2))
    for k, v in ((new[:1], new[:1]), (new, new[:, :, :1])):
        wrong = layer(room)
        try:
            found = wrong.update(k, v)
        except RuntimeError:
            continue
        for x, states in zip(found, (k, v), strict=True):
            assert torch.equal(x, torch.cat([held, states], -2))
    parameter = torch.nn.Parameter(torch.ones(4))
    where, three = Room(room[:, None], room[:, None].clone(), 5), [DynamicLayer() for _ in "abc"]
    for i, own in enumerate(three[:2]):
        expected(own, where, i)
    loss = (parameter * three[0].keys).sum()
    with torch.no_grad():
        three[1].update(new[:1], new[:1])
    expected(three[2], where, 0).update(new[:1], new[:1])[0].requires_grad_()
    loss = loss + (parameter * three[2].keys).sum()
    loss.backward()
    with torch.inference_mode():
        expected(three[1], where, 1).update(new[:1], new[:1])
    for x in expected(three[2], where, 0).update(new[:1], new[:1]):  # not from that mode
        (parameter * x).sum().backward()


def test_a_layer_that_cannot_be_moved_has_neither_keys_nor_values() -> None:
    def moved(x: torch.Tensor) -> torch.Tensor:
        if x[0, 0, 0, 0] == 1:
            raise kvtc.UnsupportedError("beyond")
        return x

    k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    layer: Any = DynamicLayer()
    layer.lazy_initialization(k, v)
    expect(layer, Coming(Room(k[None], v[None], 2), 0, lambda: None, moved, False))
    for _ in range(2):
        with pytest.raises(kvtc.UnsupportedError, match="beyond"):
            layer.keys  # noqa: B018


def test_layers_that_do_not_arrive() -> None:
    """All who wait for them are told."""

    def steps() -> Iterator[None]:
        yield
        raise kvtc.FormatError("damaged")

    arrivals = Arrivals(steps())
    arrivals.wait(0)
    for group in (1, 2, 1):
        with pytest.raises(kvtc.FormatError, match="damaged"):
            arrivals.wait(group)
    arrivals.wait(0)
