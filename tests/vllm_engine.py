"""An engine of vLLM that serves some requests: ``python vllm_engine.py IN OUT``, JSON both.

Run as a process of its own, because an engine's memory comes back only with its end. ``IN`` has
``model``, ``engine`` (keywords of ``LLM``), ``connector`` (``kv_connector_extra_config``, or null),
``connector_name`` (of vLLM's own ones),
``requests`` (each with ``ids``, and ``tokens`` to generate or ``score`` for log-probabilities of
the prompt), ``pages`` and ``folder``: it ends when the folder holds so many files. A request with
``pages`` is followed by the next when there are so many, and tells of those that are new; one with
``forget`` begins when the engine has dropped its own prefix cache.
``metrics``: what ours count goes to the log.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
#: On GPUs: so few blocks as on a CPU, and no multicast over NVLink.
GPU = {
    "gpu_memory_utilization": 0.1,
    "num_gpu_blocks_override": 256,
    "disable_custom_all_reduce": True,
}
GPU_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def main(given: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    engine = {"dtype": "bfloat16"} | given.get("engine", {})
    if torch.cuda.is_available():
        engine = GPU | engine
        os.environ.update(GPU_ENVIRONMENT)
    from vllm import LLM, SamplingParams

    connector, name = given["connector"], given.get("connector_name", "KvtcConnector")
    llm = LLM(
        model=given["model"],
        enforce_eager=True,
        skip_tokenizer_init=given.get("skip_tokenizer", False),
        kv_transfer_config=connector
        and {
            "kv_connector": name,
            "kv_connector_module_path": None
            if name != "KvtcConnector"
            else "kvtc_stream.integrations.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": connector,
        },
        **engine,
    )
    found: list[dict[str, Any]] = []
    folder, known = given.get("folder"), set()
    for request in given["requests"]:
        if request.get("forget"):
            while not llm.reset_prefix_cache():  # blocks are held until their pages are stored
                llm.generate([{"prompt_token_ids": [1]}], use_tqdm=False)
        score = request.get("score", 0)
        parameters = SamplingParams(
            max_tokens=request.get("tokens", 1),
            temperature=0,
            logprobs=request.get("next", score or 1),
            detokenize=False,
            ignore_eos=True,
            prompt_logprobs=score or None,
            skip_reading_prefix_cache=False,
        )
        prompts = [
            {"prompt_token_ids": ids}
            | ({"cache_salt": request["salt"]} if "salt" in request else {})
            for ids in request["ids"]
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        for output in outputs:
            cached = output.num_cached_tokens
            found.append(
                {
                    "seconds": seconds,
                    "cached": cached,
                    "ids": list(output.outputs[0].token_ids),
                    "reason": output.outputs[0].finish_reason,
                    "next": {int(i): x.logprob for i, x in output.outputs[0].logprobs[0].items()},
                    "logprobs": [
                        {int(i): x.logprob for i, x in (row or {}).items()}
                        for row in (output.prompt_logprobs or [])[cached + 1 :]
                    ],
                }
            )
        if "pages" in request:
            files = waited_for(folder, request["pages"])
            found[-1]["files"] = sorted(files - known)
            known = files
    if folder:
        waited_for(folder, given.get("pages", 0))
    if given.get("metrics"):
        for metric in llm.get_metrics():
            if "kvtc" in metric.name:
                print(metric.name, metric.value)
    return found


def waited_for(folder: str, pages: int) -> set[str]:
    """Files in a folder, when there are so many."""
    deadline = time.monotonic() + 300
    while len(files := {str(p) for p in Path(folder).rglob("*") if p.is_file()}) < pages:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} has {len(files)} pages of {pages}")
        time.sleep(0.2)
    return files


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
