"""Asks a server that speaks OpenAI's completions, and notes when each token comes.

Prompts are token ids, which vLLM, SGLang and others take. Known load generators report percentiles
of all requests together; what is needed here is those of returning and of fresh ones apart, of one
trace against several servers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvtc_stream.evaluation.serving.figures import Outcome
from kvtc_stream.evaluation.serving.trace import Request
from kvtc_stream.progress import Progress

#: Characters that are tokenised at a time: a server may refuse more than its context.
_PIECE = 2000


def _quiet(done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Client:
    """A server, and how time passes.

    Attributes
    ----------
    url
        Of the server, without ``/v1``.
    model
        Its name there.
    timeout
        Seconds after which a request has failed.
    clock, sleep
        Seconds, and what waits for some.
    """

    url: str
    model: str
    timeout: float = 600.0
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def open_loop(
        self,
        requests: Sequence[Request],
        arrivals: Sequence[float],
        progress: Progress = _quiet,
    ) -> list[Outcome]:
        """Send each request when it is due, seconds after the start, whatever the server does."""

        async def run(session: aiohttp.ClientSession) -> list[Outcome]:
            start, done = self.clock(), 0

            async def one(request: Request, arrival: float) -> Outcome:
                nonlocal done
                await self.sleep(max(start + arrival - self.clock(), 0.0))
                outcome = await self._send(session, request, start + arrival)
                done += 1
                progress(done, len(requests))
                return outcome

            return await asyncio.gather(*map(one, requests, arrivals))

        return asyncio.run(self._within_session(run))

    def closed_loop(
        self, requests: Iterable[Request], users: int, progress: Progress = _quiet
    ) -> list[Outcome]:
        """Users who each send the next request when their last one is answered."""
        wanted = list(requests)

        async def run(session: aiohttp.ClientSession) -> list[Outcome]:
            found: list[Outcome] = []
            pending = iter(wanted)

            async def user() -> None:
                for request in pending:
                    found.append(await self._send(session, request, self.clock()))
                    progress(len(found), len(wanted))

            await asyncio.gather(*(user() for _ in range(users)))
            return found

        return asyncio.run(self._within_session(run))

    def tokenise(self, texts: Iterable[str], enough: int) -> list[int]:
        """Token ids of texts, by vLLM's ``/tokenize``, until there are enough.

        Raises
        ------
        OSError
            The server cannot be reached, or knows no ``/tokenize``.
        """
        pieces = (text[i : i + _PIECE] for text in texts for i in range(0, len(text), _PIECE))

        async def run(session: aiohttp.ClientSession) -> list[int]:
            ids: list[int] = []
            for piece in pieces:
                body = {"model": self.model, "prompt": piece, "add_special_tokens": False}
                async with session.post(f"{self.url}/tokenize", json=body) as response:
                    if response.status != 200:
                        raise OSError(
                            f"{self.url}/tokenize: status {response.status}; leave out --text to "
                            f"draw token ids"
                        )
                    ids += (await response.json())["tokens"]
                if len(ids) >= enough:
                    break
            return ids

        return asyncio.run(self._within_session(run))

    async def _within_session(self, run: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
        ) as session:
            return await run(session)

    async def _send(self, session: aiohttp.ClientSession, request: Request, due: float) -> Outcome:
        body = {
            "model": self.model,
            "prompt": request.prompt.tolist(),
            "max_tokens": request.answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times: list[float] = []
        usage: dict[str, Any] = {}
        try:
            async with session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:200]
                    return Outcome(request, due, error=f"status {response.status}: {text}")
                async for line in response.content:
                    chunk = _chunk(line)
                    if chunk.get("error"):
                        return Outcome(request, due, error=str(chunk["error"])[:200])
                    if chunk.get("choices"):
                        times.append(self.clock())
                    usage = chunk.get("usage") or usage
        except (aiohttp.ClientError, TimeoutError) as error:
            return Outcome(request, due, error=str(error) or type(error).__name__)
        if not times:
            return Outcome(request, due, error="an empty answer")
        details = usage.get("prompt_tokens_details") or {}
        return Outcome(
            request,
            due,
            tuple(times),
            usage.get("completion_tokens", len(times)),
            details.get("cached_tokens", 0 if "prompt_tokens_details" in usage else None),
        )


def _chunk(line: bytes) -> dict[str, Any]:
    """What a line of an event stream carries."""
    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
        return {}
    found: dict[str, Any] = json.loads(line[5:])
    return found
