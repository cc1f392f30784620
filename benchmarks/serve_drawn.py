"""A model and its calibration for ``kvtc bench serve``, drawn; needs a CUDA device.

    python benchmarks/serve_drawn.py --shape Llama-3.1-8B FOLDER
    kvtc bench serve --model FOLDER --calibration FOLDER/calibration.safetensors --ratio 8 \\
        --connector-config '{"error_bound": null}' \\
        --serve-args="--load-format dummy --skip-tokenizer-init --dtype bfloat16"

vLLM draws the weights itself, those of norms too, so that keys and values are noise of a known
deviation, which no basis compresses. The bases are drawn as those of ``gpu.py``, with components
that are all alike and as large as that noise. So pages are as small as the ratio says, and coding
them takes as long as with a model that has learnt something. What is restored is far from what was
stored: an ``error_bound`` would keep all of it bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gpu import GEOMETRIES, NETWORKS, Model, llama_config

#: vLLM draws dummy weights evenly between this and its negative.
MOST = 1e-3


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", required=True, choices=list(NETWORKS))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    # Small: hidden states of such weights are small, too.
    options = {"rms_norm_eps": 1e-12, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    llama_config(args.shape, **options).save_pretrained(args.folder)
    # A key is the product of weights with a normed state, times the norm's weights.
    deviation = NETWORKS[args.shape][0] ** 0.5 * MOST**2 / 3
    model = Model(*GEOMETRIES[args.shape], reach=0, deviation=deviation)
    model.calibration.save(args.folder / "calibration.safetensors")


if __name__ == "__main__":
    main()
