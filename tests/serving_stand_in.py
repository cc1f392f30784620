"""Stands in for ``vllm serve``: answers after known delays, and remembers what it has read.

``python serving_stand_in.py --model MODEL --port N ...``; a prompt of ``BROKEN`` tokens is refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from aiohttp import web

#: Seconds to the first token, and between tokens.
FIRST, NEXT = 0.03, 0.01
#: Tokens of a prompt that it does not like.
BROKEN = 13


class StandIn:
    """What the server keeps: prompts, and how many tokens it has seen."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.queries = 0

    def cached(self, prompt: list[int]) -> int:
        """Leading tokens that it has read before."""
        found = 0
        for known in self.prompts:
            same = 0
            for ours, theirs in zip(prompt, known, strict=False):
                if ours != theirs:
                    break
                same += 1
            found = max(found, same)
        return found

    async def completions(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        prompt = asked["prompt"]
        if len(prompt) == BROKEN:
            return web.json_response({"error": "no"}, status=400)
        cached = self.cached(prompt)
        self.prompts.append(prompt)
        self.queries += len(prompt)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for i in range(asked["max_tokens"]):
            await asyncio.sleep(NEXT if i else FIRST)
            await answer.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        usage = {
            "completion_tokens": asked["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        await answer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": list((await request.json())["prompt"].encode())})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "stand-in"}]})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text="# TYPE vllm:prefix_cache_queries counter\n"
            f'vllm:prefix_cache_queries_total{{engine="0"}} {self.queries}\n'
        )

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    def application(self) -> web.Application:
        """Ready to run."""
        made = web.Application()
        made.router.add_post("/v1/completions", self.completions)
        made.router.add_post("/tokenize", self.tokenize)
        made.router.add_get("/v1/models", self.models)
        made.router.add_get("/metrics", self.metrics)
        made.router.add_get("/version", self.version)
        made.router.add_get("/health", self.health)
        return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--kv-cache-dtype", help="serves none")
    given, _ = parser.parse_known_args()
    if given.fail or given.kv_cache_dtype:
        raise SystemExit(3)
    web.run_app(StandIn().application(), host="127.0.0.1", port=given.port, print=None)
