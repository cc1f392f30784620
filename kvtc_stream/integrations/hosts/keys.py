"""Whose a page is: one description for its name in a store and for its seal.

A page may be read only by who would have written the same one: the same model, calibration, codec,
layout, adapters, tenant and tokens. All of that goes into one chain of digests, page by page. The
name of a page is its digest; the page is sealed as that name and its position.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DOMAIN = b"kvtc page chain 1\0"
_DIGEST_DOMAIN = b"kvtc page digest 1\0"


@dataclass(frozen=True)
class PageKey:
    """A page of one chain.

    Attributes
    ----------
    name
        In a store: the namespace and the page's own digest, hex.
    position
        Of its first token.
    """

    name: str
    position: int

    @property
    def identity(self) -> bytes:
        """What the page is sealed as."""
        return f"{self.name}@{self.position}".encode()

    def part(self, number: int, parts: int) -> PageKey:
        """The key of what one of several processes has of the page: some of its KV heads."""
        return self if parts == 1 else PageKey(f"{self.name}.{number}", self.position)


class Namespace:
    """All pages that one configuration may share.

    Parameters
    ----------
    facts
        Everything that pages depend on and tokens do not say, as JSON: model, calibration, codec,
        dtype, parallel layout, format version, tokens of a page.

    Attributes
    ----------
    digest
        SHA-256 of the facts.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        self.digest = hashlib.sha256(text.encode()).digest()
        #: Names begin with it, so that pages of one namespace can be listed, or deleted.
        self.prefix = self.digest[:8].hex()

    def page(self, digest: bytes, position: int) -> PageKey:
        """The page at ``position`` of a host that names it by a digest of its own: of its tokens,
        of all before them, and of whatever else pages of this configuration depend on."""
        own = hashlib.sha256(_DIGEST_DOMAIN + self.digest + digest)
        return PageKey(self._name(own.hexdigest()), position)

    def chain(self, root: Any, page_tokens: int) -> Chain:
        """The pages of one request; ``root`` is what else they depend on, as JSON: its adapter and
        its tenant."""
        return Chain(self, root, page_tokens)

    def _name(self, digest: str) -> str:
        return f"{self.prefix}/{digest[:2]}/{digest}"


class Chain:
    """The keys of one request's pages, which grow with it."""

    def __init__(self, namespace: Namespace, root: Any, page_tokens: int) -> None:
        text = json.dumps(root, sort_keys=True, separators=(",", ":"))
        self._last = hashlib.sha256(_DOMAIN + namespace.digest + text.encode()).digest()
        self._namespace, self._page_tokens = namespace, page_tokens
        self.keys: list[PageKey] = []

    def extend(
        self,
        tokens: Sequence[int],
        extras: Sequence[tuple[int, int, str]] = (),
        count: int | None = None,
    ) -> list[PageKey]:
        """Keys of all whole pages of the first ``count`` tokens, which begin with those before.

        ``extras`` are (first token, end, what it is) of parts whose token ids do not say what they
        are, such as images: they are part of the pages that they touch.
        """
        size, count = self._page_tokens, len(tokens) if count is None else count
        first, last = len(self.keys) * size, count // size * size
        # All of them at once: the engine waits for the names of long prompts.
        data = memoryview(array("q", tokens[first:last] if first < last else ()).tobytes())
        for start in range(first, last, size):
            end = start + size
            own = [[a - start, b - start, what] for a, b, what in extras if a < end and b > start]
            digest = hashlib.sha256(self._last)
            digest.update(data[8 * (start - first) : 8 * (end - first)])
            digest.update(json.dumps(own, separators=(",", ":")).encode() if own else b"[]")
            self._last = digest.digest()
            self.keys.append(PageKey(self._namespace._name(self._last.hex()), start))
        return self.keys
