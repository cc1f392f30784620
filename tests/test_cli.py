"""The command line, run in this process, and through real pipes where that matters."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvtc_stream as kvtc
from kvtc_stream.cli import main, terminal
from kvtc_stream.cli.arguments import make_parser
from kvtc_stream.formats import (
    BlockErrors,
    DType,
    Geometry,
    Measure,
    Rope,
    StreamFile,
    StreamWriter,
)
from kvtc_stream.io import plain
from kvtc_stream.io.plain import PlainSection

GEOMETRY = Geometry.uniform(layers=3, kv_heads=2, head_dim=8, rope=Rope.from_theta(1e4, 8))
TOKENS = 300


@dataclass
class Run:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def kvtc_command(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> Run:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return Run(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A calibration, a bfloat16 cache, and its stream."""
    folder = tmp_path_factory.mktemp("files")
    made = SimpleNamespace(
        calibration=folder / "cal.safetensors",
        cache=folder / "in.safetensors",
        stream=folder / "in.kvtc",
    )
    calibrator = kvtc.Calibrator(GEOMETRY, model=kvtc.ModelIdentity("tiny\x1b[2J"))
    calibrator.update(*kvtc.testing.drawn_cache(GEOMETRY, 600, seed=1))
    calibration = calibrator.finish()
    calibration.save(made.calibration)
    made.k, made.v = kvtc.testing.drawn_cache(GEOMETRY, TOKENS, seed=2, dtype=DType.BFLOAT16)
    plain.write(made.cache, [PlainSection(made.k, made.v)])
    codec = kvtc.Codec(calibration, "paper", ratio=6, window=16, block_tokens=64)
    with kvtc.open(made.stream, "wb", codec=codec, metadata={"prompt": "x\x1b[2J"}) as writer:
        writer.write(made.k, made.v)
    return made


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# The whole way.


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_calibrate_encode_decode_verify(tmp_path: Path, kvtc_command, suffix: str):
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.{suffix}")
        cache = kvtc.testing.drawn_cache(GEOMETRY, 300, seed=seed, dtype=DType.BFLOAT16)
        plain.write(paths[-1], [PlainSection(*cache)])
    cal, out, back = tmp_path / "cal.safetensors", tmp_path / "x.kvtc", tmp_path / f"back.{suffix}"

    run = kvtc_command(
        "calibrate", *paths[:2], "-o", cal, "--rope-theta", 10000, "--name", "m", "--json"
    )
    assert (run.status, run.err) == (0, "")
    assert run.json["model"]["name"] == "m"
    assert run.json["digest"] == kvtc.Calibration.load(cal).digest.hex()
    assert kvtc.Calibration.load(cal).geometry == GEOMETRY
    assert kvtc.Calibration.load(cal).tokens == 2 * (300 - 4)

    run = kvtc_command("encode", paths[2], "-c", cal, "-o", out, "--ratio", 8, "--window", 32)
    assert (run.status, run.err) == (0, "")
    assert "every one counted" in run.out

    run = kvtc_command("decode", out, "-c", cal, "-o", back, "--json")
    assert (run.status, run.err) == (0, "")
    assert run.json["dtype"] == "bfloat16"
    assert run.json["sections"][0]["k_shape"] == [3, 2, 300, 8]
    [found] = plain.read(back)
    [expected] = plain.read(paths[2])
    assert found.dtype is DType.BFLOAT16
    assert equal_bits(found.k[:, :, :4], expected.k[:, :, :4])
    assert equal_bits(found.v[:, :, -32:], expected.v[:, :, -32:])
    assert found.positions is not None
    assert found.positions.tolist() == list(range(300))

    run = kvtc_command("verify", out, "-c", cal, "--against", paths[2], "--json")
    assert (run.status, run.err) == (0, "")
    comparison = run.json["comparison"]
    assert comparison["verbatim_tokens"] + comparison["coded_tokens"] == 300
    info = kvtc_command("info", out, "--json").json
    for name in ("k_mean", "k_worst", "v_mean", "v_worst"):
        assert comparison[name] == pytest.approx(info["errors"][name], rel=1e-5)


def test_pipes(tmp_path: Path, files: SimpleNamespace):
    """IN, OUT and the stream between them through real pipes."""

    def run(*arguments: object, data: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [
            sys.executable,
            "-c",
            "from kvtc_stream.cli import main; raise SystemExit(main())",
        ]
        return subprocess.run(
            [*command, *map(str, arguments)], input=data, capture_output=True, timeout=120
        )

    cal = files.calibration
    options = ("--preset", "paper", "--ratio", 6, "--window", 16, "--block-tokens", 64)
    options = (*options, "--metadata", json.dumps({"prompt": "x\x1b[2J"}))
    encoded = run(
        "encode", "-", "--format", "safetensors", "-c", cal, "-o", "-", *options,
        data=files.cache.read_bytes(),
    )  # fmt: skip
    assert encoded.returncode == 0, encoded.stderr
    assert encoded.stdout == files.stream.read_bytes()
    assert b"every one counted" in encoded.stderr

    decoded = run(
        "decode", "-", "-c", cal, "-o", "-", "--format", "npz",
        "--tokens", "100:200", "--layers", "1:", data=encoded.stdout,
    )  # fmt: skip
    assert decoded.returncode == 0, decoded.stderr
    [found] = plain.read(io.BytesIO(decoded.stdout), "npz")
    k, v = kvtc.decode(encoded.stdout, kvtc.Calibration.load(cal))
    assert equal_bits(found.k, k[1:, :, 100:200])
    assert equal_bits(found.v, v[1:, :, 100:200])

    assert run("verify", "-", data=encoded.stdout).returncode == 0
    cut = run("verify", "-", data=encoded.stdout[:-100])
    assert cut.returncode == 1
    assert b"kvtc: error: -: the stream ends after" in cut.stderr
    negative = run("decode", "-", "-c", cal, "-o", "-", "--format", "npz", "--tokens=-5:",
                   data=encoded.stdout)  # fmt: skip
    assert negative.returncode == 1
    assert b"count from the end, which a pipe does not tell" in negative.stderr


#: ``kvtc`` that waits in its first write of a stream; ignores the signals whose names come first.
_WAITING = """
import signal, sys, time
from kvtc_stream.cli import main
from kvtc_stream.stream.writer import Writer

def wait(self, *_, **__):
    self._file.write(b"some bytes")
    print("writing", flush=True)
    time.sleep(60)

Writer.write = wait
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
for name in sys.argv.pop(1).split():
    signal.signal(getattr(signal, name), signal.SIG_IGN)
raise SystemExit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the signals are Unix's")
@pytest.mark.parametrize(
    ("ignored", "sent", "ended"),
    [("", "SIGTERM", "SIGTERM"), ("", "SIGHUP", "SIGHUP"), ("SIGHUP", "SIGHUP SIGTERM", "SIGTERM")],
)
def test_signals_that_end_a_command_leave_no_partial_file(
    tmp_path: Path, files: SimpleNamespace, ignored: str, sent: str, ended: str
):
    output = tmp_path / "out.kvtc"
    output.write_bytes(b"what was there")
    command = [sys.executable, "-c", _WAITING, ignored, "encode", files.cache]
    with subprocess.Popen(
        [*command, "-c", files.calibration, "-o", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        for name in sent.split():
            process.send_signal(signal.Signals[name])
            time.sleep(0.1)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.Signals[ended]
    assert f"kvtc: error: ended by {ended}" in said.decode()
    assert list(tmp_path.iterdir()) == [output]
    assert output.read_bytes() == b"what was there"


def test_start_up_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from kvtc_stream.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'numba', 'torch', 'rich'} & set(sys.modules)\n"
        "raise SystemExit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "kvtc_stream", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"kvtc-stream {kvtc.__version__}\n"


# calibrate


def write_cache(
    path: Path, geometry: Geometry = GEOMETRY, tokens: int = 300, **others: Any
) -> Path:
    plain.write(path, [PlainSection(*kvtc.testing.drawn_cache(geometry, tokens), **others)])
    return path


@pytest.mark.parametrize(
    ("options", "rope"),
    [
        (["--rope", "none"], None),
        (["--rope-theta", "500"], Rope.from_theta(500, 8)),
        (
            ["--rope-theta", "500", "--rotary-dim", "4", "--rope-interleaved"],
            Rope.from_theta(500, 4, interleaved=True),
        ),
    ],
)
def test_calibrate_records_what_the_keys_carry(tmp_path, kvtc_command, options, rope):
    cache, cal = write_cache(tmp_path / "x.npz"), tmp_path / "cal.safetensors"
    options = [*options, "--rank", "20", "--layer-groups", "3", "--sinks", "10"]
    run = kvtc_command("calibrate", cache, "-o", cal, *options)
    assert (run.status, run.err) == (0, "")
    made = kvtc.Calibration.load(cal)
    assert made.geometry == Geometry.uniform(layers=3, kv_heads=2, head_dim=8, rope=rope)
    assert made.tokens == 290
    parts = made.sections[0].basis("separate")
    assert len(parts) == 6
    assert {part.rank for part in parts} == {min(20, 16)}


def test_calibrate_in_two_levels(tmp_path, kvtc_command):
    cache, cal = write_cache(tmp_path / "x.npz"), tmp_path / "cal.safetensors"
    options = ["--rope", "none", "--layer-groups", "3", "--second-level", "40"]
    run = kvtc_command("calibrate", cache, "-o", cal, *options)
    assert (run.status, run.err) == (0, "")
    [part] = kvtc.Calibration.load(cal).sections[0].basis("joint")
    assert sum(part.components.leading) == 40
    assert "of 3 groups, then 40" in run.out
    shown = json.loads(kvtc_command("info", cal, "--json").out)
    [found] = shown["sections"][0]["bases"]["joint"]
    assert (found["groups"], found["second_level"]) == (3, 40)


def test_calibrate_takes_positions_and_scales(tmp_path, kvtc_command):
    """Bytes with scales calibrate as their values do."""
    geometry = Geometry.uniform(layers=2, kv_heads=2, head_dim=8)
    k, v = kvtc.testing.drawn_cache(geometry, 200, dtype=DType.FLOAT8_E4M3FN)
    positions, scale = np.arange(200) * 2, np.array([[1, 2], [4, 8]], np.float32)
    values = [a.astype(np.float32) * scale[:, :, None, None] for a in (k, v)]
    plain.write(tmp_path / "8.safetensors", [PlainSection(k, v, positions, scale, scale)])
    plain.write(tmp_path / "32.safetensors", [PlainSection(*values, positions)])
    rope = Rope.from_theta(100, 8)
    calibrator = kvtc.Calibrator(Geometry.uniform(layers=2, kv_heads=2, head_dim=8, rope=rope))
    calibrator.update(*values, positions=positions)
    expected = calibrator.finish().digest
    for name in ("8", "32"):
        cal = tmp_path / f"cal{name}.safetensors"
        run = kvtc_command(
            "calibrate", tmp_path / f"{name}.safetensors", "-o", cal, "--rope-theta", 100
        )
        assert run.status == 0
        assert kvtc.Calibration.load(cal).digest == expected


def test_calibrate_warns_in_one_line(tmp_path, kvtc_command):
    cache = write_cache(tmp_path / "x.npz", tokens=50)
    run = kvtc_command("calibrate", cache, "-o", tmp_path / "c.safetensors", "--rope", "none")
    assert run.status == 0
    assert run.err.startswith("kvtc: warning: calibrated on 46 tokens")
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.npz"], "say what the keys in IN carry: --rope-theta THETA"),
        (["x.npz", "--rope", "none", "--rope-theta", "1"], "say what the keys in IN carry"),
        (["x.npz", "--rope", "none", "--rotary-dim", "4"], "go with --rope-theta"),
        (["--rope", "none"], "give plain caches IN"),
        (["x.npz", "--rope", "none", "--text", "t"], "--text goes with --model"),
        (["x.npz", "--rope", "none", "--importance", "none"], "--importance goes with --model"),
        (["--model", "m", "--text", "t", "--importance-documents", "0"], "at least 1, found 0"),
        (
            ["--model", "m", "--text", "t", "--importance", "none", "--importance-documents", "1"],
            "leave out --importance-documents",
        ),
        (["--model", "m"], "--model needs --text"),
        (["--model", "m", "--text", "t", "--rope", "none"], "leave out --rope"),
        (["x.npz", "--model", "m"], r"leave out x.npz"),
    ],
)
def test_calibrate_explains_wrong_use(kvtc_command, arguments, message):
    run = kvtc_command("calibrate", *arguments, "-o", "cal.safetensors")
    assert run.status == 2
    assert run.err.startswith("usage: kvtc calibrate")
    assert message in run.err


def test_calibrate_refuses_caches_that_differ(tmp_path, kvtc_command):
    one = write_cache(tmp_path / "1.npz")
    other = write_cache(tmp_path / "2.npz", Geometry.uniform(layers=3, kv_heads=1, head_dim=8))
    run = kvtc_command(
        "calibrate", one, other, "-o", tmp_path / "cal.safetensors", "--rope", "none"
    )
    assert run.status == 1
    assert "2.npz: k has shape [3, 1, 300, 8]; expected [layers=3, kv_heads=2" in run.err
    assert not (tmp_path / "cal.safetensors").exists()


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Texts of 100 characters each; characters are the tiny model's tokens."""
    rng = np.random.default_rng(0)
    names = ("a.txt", "b.txt")
    for name in names:
        letters = rng.choice(list("abcdefg "), 100)
        (tmp_path / name).write_text("".join(letters), encoding="utf-8")
    return [tmp_path / name for name in names]


def test_calibrate_a_model(tmp_path, model_folder, texts, kvtc_command):
    cal = tmp_path / "cal.safetensors"
    run = kvtc_command(
        "calibrate", "--model", model_folder, "--text", *texts,
        "-o", cal, "--tokens", 150, "--document-tokens", 50, "--sinks", 2, "--json",
    )  # fmt: skip
    assert run.status == 0, run.err
    made = kvtc.Calibration.load(cal)
    assert made.tokens == 3 * (50 - 2)
    assert made.model.name == "tiny"
    assert made.geometry.sections[0].k_shape(1) == (2, 2, 1, 8)
    assert run.json["digest"] == made.digest.hex()


@pytest.mark.parametrize(
    ("importance", "documents"),
    [(None, None), ("gradients", 1), ("queries", None), ("queries", 1), ("none", None)],
)
def test_calibrate_by_importance(
    tmp_path, model_folder, texts, kvtc_command, importance, documents
):
    """As the library does it; documents of 50 tokens, 4 in all."""
    from kvtc_stream.integrations.transformers import calibrate, load_model

    chosen = {"importance": importance, "importance_documents": documents}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    cal = tmp_path / "cal.safetensors"
    run = kvtc_command(
        "calibrate", "--model", model_folder, "--text", *texts, "-o", cal, "--document-tokens", 50,
        *options, "--json",
    )  # fmt: skip
    assert run.status == 0, run.err
    [section] = run.json["sections"]
    assert section["bases"]["joint"][0]["weighted"] is (importance != "none")
    model, tokenizer = load_model(model_folder)
    expected = calibrate(
        model,
        [text.read_text(encoding="utf-8") for text in texts],
        tokenizer=tokenizer,
        document_tokens=50,
        **chosen,
    )
    assert run.json["digest"] == expected.digest.hex()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_calibrate_a_model_in_parts(tmp_path, model_folder, texts, kvtc_command, device_map):
    """Wherever its layers are, it is the same model."""
    pytest.importorskip("accelerate")
    found = []
    for options in ([], ["--device-map", device_map, "--dtype", "float32"]):
        run = kvtc_command(
            "calibrate", "--model", model_folder, "--text", *texts, "-o", tmp_path / "cal",
            "--importance-documents", 1, "--document-tokens", 50, *options, "--json",
        )  # fmt: skip
        assert run.status == 0, run.err
        found.append(run.json["digest"])
    assert found[0] == found[1]


def test_a_model_that_does_not_fit_is_refused(tmp_path, model_folder):
    """Where devices have no room, transformers would leave weights on disk."""
    pytest.importorskip("accelerate")
    from kvtc_stream.integrations.transformers import load_model

    with pytest.raises(kvtc.UnsupportedError, match=r"no room, such as .*smaller dtype"):
        load_model(
            model_folder,
            device_map="auto",
            max_memory={"cpu": "20KB"},
            offload_folder=str(tmp_path / "offload"),
        )


def test_a_type_that_the_cpu_does_not_compute_in_becomes_float32(
    tmp_path, model_folder, monkeypatch
):
    """In bfloat16 without instructions for it, calibrating would take hours."""
    torch = pytest.importorskip("torch")
    from kvtc_stream.integrations.transformers import load_model, loading, model_identity

    half = tmp_path / "half"
    model, tokenizer = load_model(model_folder)
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    monkeypatch.setattr(loading, "_computes", lambda dtype: True)
    as_it_is, _ = load_model(half)
    monkeypatch.setattr(loading, "_computes", lambda dtype: dtype == torch.float32)
    widened, _ = load_model(half)
    asked, _ = load_model(half, dtype="bfloat16")
    kinds = [torch.bfloat16, torch.float32, torch.bfloat16]
    assert [x.dtype for x in (as_it_is, widened, asked)] == kinds
    assert model_identity(as_it_is).fingerprint == model_identity(widened).fingerprint


def test_a_missing_gguf_file_says_so(tmp_path, kvtc_command):
    pytest.importorskip("transformers")
    (tmp_path / "t").write_text("x")
    run = kvtc_command(
        "calibrate", "--model", tmp_path / "m.gguf", "--text", tmp_path / "t", "-o", tmp_path / "c"
    )
    assert run.status == 1
    assert "no model at" in run.err


def test_calibrate_a_model_tells_of_solving(
    tmp_path, model_folder, texts, kvtc_command, monkeypatch
):
    """Solving can take longer than reading: "Reading: 100 %" would look like a hang."""
    monkeypatch.setattr(terminal, "_SECONDS_PER_LINE", 0.05)
    finish = kvtc.Calibrator.finish

    def slow(self, progress=None):
        time.sleep(0.5)
        return finish(self, progress)

    monkeypatch.setattr(kvtc.Calibrator, "finish", slow)
    run = kvtc_command(
        "calibrate", "--model", model_folder, "--text", *texts,
        "-o", tmp_path / "c.safetensors", "--tokens", 150,
    )  # fmt: skip
    assert run.status == 0
    assert "Solving: 0 s so far" in run.err


def test_a_missing_extra_names_the_remedy(tmp_path, kvtc_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "t").write_text("x")
    run = kvtc_command(
        "calibrate", "--model", "m", "--text", tmp_path / "t", "-o", tmp_path / "c.safetensors"
    )
    assert run.status == 1
    assert "pip install 'kvtc-stream[transformers]'" in run.err
    assert "torch" in run.err


# encode


@pytest.mark.parametrize(
    "target",
    [["--ratio", 4], ["--bits-per-token", 500], ["--mean-error", 0.3], []],
    ids=lambda t: t[0] if t else "default",
)
def test_encode_takes_every_target_with_a_bound(tmp_path, kvtc_command, files, target):
    out = tmp_path / "x.kvtc"
    run = kvtc_command(
        "encode", files.cache, "-c", files.calibration, "-o", out, *target,
        "--error-bound", 0.2, "--sinks", 7, "--window", 9, "--block-tokens", 50, "--coder", "zstd",
        "--preset", "paper",
        "--backend", "cpu", "--metadata", '{"a": [1]}', "--json",
    )  # fmt: skip
    assert run.status == 0, run.err
    report = run.json
    assert report["stream_bytes"] == out.stat().st_size
    assert report["ratio"] == pytest.approx(files.k.nbytes * 2 / out.stat().st_size)
    assert max(report["errors"]["k_worst"], report["errors"]["v_worst"]) <= 0.2
    with out.open("rb") as file:
        header = StreamFile(file).header
    assert (header.sinks, header.window, header.block_tokens) == (7, 9, 50)
    assert header.coder.name == "ZSTD"
    assert json.loads(header.metadata) == {"a": [1]}
    name, value = target or ("--ratio", 16)
    calibration = kvtc.Calibration.load(files.calibration)
    target = {name[2:].replace("-", "_"): value}
    assert header.plan == kvtc.Codec(calibration, "paper", **target).plan


def test_encode_several_sections_with_positions(tmp_path, kvtc_command):
    """Layers of a sliding window hold other tokens than those of full attention."""
    one = kvtc.Section((0, 2), 2, 8, 8)
    other = kvtc.Section((1,), 1, 16, 8)
    geometry = Geometry((one, other))
    calibrator = kvtc.Calibrator(geometry)
    for i in range(2):
        cache = kvtc.testing.drawn_cache(geometry, 200, section=i)
        calibrator.update(*cache, section=i)
    cal, cache, out = (tmp_path / name for name in ("c.safetensors", "in.safetensors", "x.kvtc"))
    calibrator.finish().save(cal)
    positions = [np.arange(200), np.arange(130, 200)]
    sections = [
        PlainSection(*kvtc.testing.drawn_cache(geometry, len(p), seed=3, section=i), p)
        for i, p in enumerate(positions)
    ]
    plain.write(cache, sections)
    run = kvtc_command("encode", cache, "-c", cal, "-o", out, "--ratio", 4, "--window", 8)
    assert run.status == 0, run.err
    assert kvtc_command("verify", out, "-c", cal, "--against", cache).status == 0

    back = tmp_path / "back.npz"
    assert kvtc_command("decode", out, "-c", cal, "-o", back).status == 0
    found = plain.read(back)
    assert [s.k.shape for s in found] == [(2, 2, 200, 8), (1, 1, 70, 16)]
    assert [s.positions.tolist() for s in found] == [p.tolist() for p in positions]
    run = kvtc_command("decode", out, "-c", cal, "-o", back, "--section", 1, "--tokens", "60:")
    assert run.status == 0
    [section] = plain.read(back)
    assert section.v.shape == (1, 1, 10, 8)
    assert section.positions.tolist() == list(range(190, 200))
    info = kvtc_command("info", out).out
    assert "section 0" in info
    assert "70 tokens at positions 130 to 199; layers 1, 1 KV heads of 16 (K) and 8 (V)" in info
    assert kvtc_command("info", cal).status == 0

    one_section = write_cache(tmp_path / "one.npz", Geometry((one,)))
    run = kvtc_command("encode", one_section, "-c", cal, "-o", out)
    assert run.status == 1
    assert "has 1 sections, the calibration is for 2" in run.err


def test_encode_fp8_with_scales(tmp_path, kvtc_command, files):
    k, v = kvtc.testing.drawn_cache(GEOMETRY, 200, seed=4, dtype=DType.FLOAT8_E4M3FN)
    scale = np.array([[0.5, 1], [2, 3], [1, 1]], np.float32)
    cache, out, back = (tmp_path / name for name in ("in.safetensors", "x.kvtc", "back.npz"))
    plain.write(cache, [PlainSection(k, v, None, scale, None)])
    run = kvtc_command(
        "encode", cache, "-c", files.calibration, "-o", out, "--ratio", 4, "--window", 128
    )
    assert run.status == 0, run.err
    run = kvtc_command("verify", out, "-c", files.calibration, "--against", cache)
    assert run.status == 0, run.err
    assert kvtc_command("decode", out, "-c", files.calibration, "-o", back).status == 0
    with np.load(back) as archive:
        expected = k.astype(np.float32) * scale[:, :, None, None]
        np.testing.assert_allclose(archive["k"][:, :, -100:], expected[:, :, -100:], rtol=2**-8)
    plain.write(cache, [PlainSection(k, v, None, scale * 1.5, None)])
    run = kvtc_command("verify", out, "-c", files.calibration, "--against", cache)
    assert run.status == 1
    assert "K of verbatim tokens differs" in run.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--ratio", "4", "--bits-per-token", "9"], 2, "not allowed with argument"),
        (["--metadata", "[1]"], 2, "expected a JSON object"),
        (["--metadata", "{"], 2, "no JSON"),
        (["--metadata", '{"a": NaN}'], 2, "no JSON: it has no NaN"),
        (["--ratio", "0"], 1, "ratio must be positive"),
        (["--preset", "best"], 1, "preset must be one of"),
        (["--coder", "zip"], 1, "coder must be one of"),
        (["--format", "pt"], 1, "the format must be one of npz, safetensors, found 'pt'"),
        (["--format", "npz"], 1, "is not a readable .npz file"),
        (["-c", "nothing.safetensors"], 1, "no calibration file at nothing.safetensors"),
        (["-o", "no/such/folder/x"], 1, "no directory no/such/folder"),
        (["-o", "."], 1, ". is a directory"),
        (["-o", "x.npz"], 2, "x.npz would be a stream, and its name says something else"),
        (["-o", "-", "--json"], 2, "--json and -o - both want standard output"),
    ],
)
def test_encode_says_what_is_wrong(
    tmp_path, kvtc_command, files, monkeypatch, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    run = kvtc_command("encode", files.cache, "-c", files.calibration, "-o", "x.kvtc", *arguments)
    assert run.status == status
    assert message in run.err
    assert run.out == ""
    assert not list(tmp_path.iterdir())


def test_encode_warns_of_a_poor_ratio(tmp_path, kvtc_command, files):
    run = kvtc_command(
        "encode", files.cache, "-c", files.calibration, "-o", tmp_path / "x", "--window", 1000
    )
    assert run.status == 0
    assert run.err.startswith("kvtc: warning: the stream is only")
    assert run.err.count("\n") == 1


def test_the_name_alone_tells_what_there_is(kvtc_command):
    run = kvtc_command()
    assert run.status == 2
    assert not run.out
    assert "learn a model's cache" in run.err
    assert "{quality,tasks,serve}" in kvtc_command("bench").err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("calibrate", "CACHE", "--rope", "none", "-o", "-"), "a calibration"),
        (("info", "STREAM", "--plot", "-"), "a picture"),
        (("bench", "quality", "--text", "CACHE", "--output", "-"), "figures"),
    ],
)
def test_what_standard_output_cannot_take(
    tmp_path, kvtc_command, files, monkeypatch, arguments, what
):
    """It is not written to a file of that name."""
    monkeypatch.chdir(tmp_path)
    names = {"CACHE": files.cache, "STREAM": files.stream}
    run = kvtc_command(*(names.get(x, x) for x in arguments))
    assert run.status == 2
    assert f"standard output cannot take {what}" in run.err
    assert list(tmp_path.iterdir()) == []


def test_closed_standard_streams(tmp_path, kvtc_command, files, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    for arguments in (
        ("info", "-"),
        ("encode", "-", "-c", files.calibration, "-o", tmp_path / "a"),
    ):
        run = kvtc_command(*arguments)
        assert run.status == 2
        assert "standard input is closed" in run.err
    monkeypatch.setattr("sys.stdout", None)
    assert kvtc_command("cat", files.stream, "-o", "-").status == 2


def test_binary_output_does_not_go_to_a_terminal(kvtc_command, files, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run = kvtc_command("decode", files.stream, "-c", files.calibration, "-o", "-")
    assert run.status == 2
    assert "standard output is a terminal" in run.err


# decode


@pytest.mark.parametrize("tokens", [None, slice(10, 20), slice(-30, None)])
@pytest.mark.parametrize("layers", [None, slice(1, 3), slice(None, -1)])
def test_decode_ranges(tmp_path, kvtc_command, files, tokens, layers):
    def text(name: str, part: slice | None) -> list[str]:
        ends = (
            [] if part is None else ["" if n is None else str(n) for n in (part.start, part.stop)]
        )
        return [f"--{name}={':'.join(ends)}"] if ends else []

    back = tmp_path / "back.safetensors"
    run = kvtc_command(
        "decode", files.stream, "-c", files.calibration, "-o", back,
        *text("tokens", tokens), *text("layers", layers),
    )  # fmt: skip
    assert (run.status, run.err) == (0, "")
    [found] = plain.read(back)
    with kvtc.open(files.stream, calibration=kvtc.Calibration.load(files.calibration)) as reader:
        k, v = reader.read(tokens, layers)
    assert equal_bits(found.k, np.asarray(k))
    assert equal_bits(found.v, np.asarray(v))
    assert found.positions is not None
    assert found.positions.tolist() == list(range(TOKENS))[tokens or slice(None)]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--tokens", "5"], 2, "expected A:B"),
        (["--tokens", "a:b"], 2, "expected A:B"),
        (["--section", "1"], 1, "section must be from 0 to 0, found 1"),
        (["--tokens", "400:500"], 1, "there are 300 tokens, and --tokens 400:500 goes beyond"),
        (["--tokens", "0:301"], 1, "in.kvtc: there are 300 tokens"),
        (["--tokens", "-301:"], 1, "goes beyond them: give a range inside 0:300"),
        (["--tokens", "50:50"], 1, "--tokens 50:50 holds none"),
        (["--layers", "3:4"], 1, "there are 3 layers"),
        (["-o", "back.kvtc"], 1, "the format must be one of npz, safetensors, found 'kvtc'"),
        (["-o", "back.npz", "--format", "safetensors"], 2, "its name says something else"),
        (["-o", "back.txt"], 1, "the format must be one of npz, safetensors, found 'txt'"),
        (["-o", "-"], 1, "the format must be one of npz, safetensors, found 'none'"),
    ],
)
def test_decode_says_what_is_wrong(
    tmp_path, kvtc_command, files, monkeypatch, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    run = kvtc_command(
        "decode", files.stream, "-c", files.calibration, "-o", "back.npz", *arguments
    )
    assert run.status == status
    assert message in run.err
    assert not list(tmp_path.iterdir())


# info


def test_info_needs_no_calibration(kvtc_command, files):
    info = kvtc_command("info", files.stream, "--json").json
    size = files.stream.stat().st_size
    assert info["kind"] == "stream"
    assert sum(part["bytes"] for part in info["sizes"].values()) == info["stream_bytes"] == size
    assert info["cache_bytes"] == files.k.nbytes + files.v.nbytes
    assert info["ratio"] == pytest.approx(info["cache_bytes"] / size)
    assert info["coded_ratio"] > info["ratio"]
    assert info["tokens"] == TOKENS == sum(p.get("tokens", 0) for p in info["sizes"].values())
    assert info["sections"][0]["layers"] == [0, 1, 2]
    assert info["sections"][0]["rope"][0]["rotary_dim"] == 8
    assert info["calibration"] == kvtc.Calibration.load(files.calibration).digest.hex()
    assert info["metadata"] == {"prompt": "x\x1b[2J"}
    assert 0 < info["errors"]["k_mean"] <= info["errors"]["k_worst"] < 1
    [plan] = info["plan"]["sections"]
    assert [part["k_layers"] for part in plan["parts"]] == [[0, 1, 2], []]
    for part in plan["parts"]:
        assert part["width"] == 48
        assert sum(band["size"] for band in part["bands"]) == part["components"]
    assert plan["ratio"] >= 6


def test_info_tells_whose_a_stream_is(tmp_path, kvtc_command, files):
    other = tmp_path / "other.safetensors"
    kvtc.testing.tiny_calibration().save(other)
    for calibration, fits in ((files.calibration, True), (other, False)):
        assert (
            kvtc_command("info", files.stream, "-c", calibration, "--json").json["calibration_fits"]
            is fits
        )
        shown = kvtc_command("info", files.stream, "-c", calibration).out
        assert f"({'' if fits else 'not '}the one given)" in " ".join(shown.split())
    assert "calibration_fits" not in kvtc_command("info", files.stream, "--json").json
    run = kvtc_command("info", other, "-c", files.calibration)
    assert run.status == 2
    assert "are for a stream" in run.err


def test_info_tables_are_complete_and_harmless(kvtc_command, files):
    run = kvtc_command("info", files.stream)
    assert (run.status, run.err) == (0, "")
    assert "\x1b" not in run.out
    info = kvtc_command("info", files.stream, "--json").json
    for text in (
        info["plan"]["digest"], info["calibration"], r"tiny\x1b[2J", "sinks 4, window 16",
        "300 tokens at positions 0 to 299", f"{info['stream_bytes']:,} bytes",
        f"{info['ratio']:.2f}×", f"{info['coded_ratio']:.2f}×", "RoPE over 8 channels (half-split",
        f"K {info['errors']['k_mean']:.4f} mean", "prompt",
    ):  # fmt: skip
        assert text in run.out, text


def test_info_shows_axes(kvtc_command):
    path = Path(__file__).parent / "golden" / "1.1" / "axes.kvtc"
    first, second = kvtc_command("info", path, "--json").json["sections"][0]["rope"]
    assert (first["axes"], second["axes"]) == ([0, 1, 2, 2], [2, 0])
    out = kvtc_command("info", path).out
    assert "3 axes with 1, 1 and 2 pairs" in out
    assert "3 axes with 1, 0 and 1 pairs" in out


def test_info_shows_the_structure(tmp_path, kvtc_command, files):
    path = tmp_path / "a.kvtc"
    path.write_bytes(files.stream.read_bytes())
    codec = kvtc.Codec(
        kvtc.Calibration.load(files.calibration), "paper", ratio=6, window=16, block_tokens=64
    )
    with kvtc.open(path, "ab", codec=codec) as writer:
        writer.write(files.k, files.v)
    found = kvtc_command("info", path, "--json").json["records"]
    kinds = [r["type"] for r in found]
    assert kinds.count("index") == 2
    assert kinds.count("supersede") == 1
    for before, after in itertools.pairwise(found):
        trailer = 40 if before["type"] == "index" else 0
        assert before["offset"] + before["bytes"] + trailer == after["offset"]
    live = [r for r in found if r.get("superseded") is False]
    assert sum(r["tokens"] for r in live) == 2 * TOKENS
    assert any(r.get("superseded") for r in found)
    out = kvtc_command("info", path).out
    for name in ("preamble and header", "tail, superseded", "supersede", "trailer"):
        assert name in out


def test_info_draws_a_stream(tmp_path, kvtc_command, files):
    calibration = kvtc.Calibration.load(files.calibration)
    uniform = tmp_path / "uniform.kvtc"
    uniform.write_bytes(kvtc.encode(files.k, files.v, kvtc.Codec(calibration, window=0)))
    pictures = []
    for i, arguments in enumerate(([files.stream], [uniform], [uniform, "-c", files.calibration])):
        picture = tmp_path / f"{i}.png"
        run = kvtc_command("info", *arguments, "--plot", picture)
        assert (run.status, run.err) == (0, "")
        pictures.append(picture.read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    assert len(set(pictures)) == 3
    run = kvtc_command("info", files.calibration, "--plot", picture)
    assert (run.status, "--plot and --calibration are for a stream" in run.err) == (2, True)


def test_info_on_a_calibration(kvtc_command, files):
    run = kvtc_command("info", files.calibration)
    assert run.status == 0
    assert kvtc.Calibration.load(files.calibration).digest.hex() in run.out
    info = kvtc_command("info", files.calibration, "--json").json
    assert info["kind"] == "calibration"
    [part, _] = info["sections"][0]["bases"]["separate"]
    assert part["rank"] == part["width"] == 48
    assert part["components_for_90_percent"] <= part["components_for_99_percent"] <= 48


def test_info_on_anything_else_is_an_error(tmp_path, kvtc_command, files):
    (tmp_path / "x").write_text("neither")
    run = kvtc_command("info", tmp_path / "x")
    assert run.status == 1
    assert "this is no kvtc stream" in run.err
    run = kvtc_command("info", files.cache)
    assert run.status == 1
    assert "is a safetensors file but not a calibration" in run.err
    run = kvtc_command("info", tmp_path / "missing")
    assert run.status == 1
    assert "No such file" in run.err


# verify


def block_offsets(path: Path) -> list[tuple[int, int]]:
    with path.open("rb") as file:
        return [(entry.offset, entry.length) for entry in StreamFile(file).index]


def test_verify_names_place_and_reason_of_damage(tmp_path, kvtc_command, files):
    data = files.stream.read_bytes()
    blocks = block_offsets(files.stream)
    damaged = tmp_path / "x.kvtc"
    for number, (offset, length) in enumerate(blocks):
        changed = bytearray(data)
        changed[offset + length // 2] ^= 1
        damaged.write_bytes(changed)
        run = kvtc_command("verify", damaged)
        assert run.status == 1
        assert run.out == ""
        assert run.err.startswith(
            f"kvtc: error: {damaged}: record {number} (BLOCK) at byte {offset}"
        )
        report = kvtc_command("verify", damaged, "--json")
        assert report.status == 1
        assert report.json["whole"] is False
        assert report.json["error"] == "ChecksumError"
        assert f"byte {offset}" in report.json["reason"]


@pytest.mark.parametrize("place", [0, 9, 30, 60, -1, -9, -60])
def test_verify_finds_a_flipped_bit_anywhere(tmp_path, kvtc_command, files, place):
    changed = bytearray(files.stream.read_bytes())
    changed[place] ^= 4
    (tmp_path / "x.kvtc").write_bytes(changed)
    assert kvtc_command("verify", tmp_path / "x.kvtc").status == 1


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:500], lambda d: d + b"\0"])
def test_verify_finds_missing_and_added_bytes(tmp_path, kvtc_command, files, change):
    (tmp_path / "x.kvtc").write_bytes(change(files.stream.read_bytes()))
    assert kvtc_command("verify", tmp_path / "x.kvtc").status == 1


def test_verify_with_the_wrong_calibration(tmp_path, kvtc_command, files):
    other = tmp_path / "other.safetensors"
    calibrator = kvtc.Calibrator(GEOMETRY)
    calibrator.update(*kvtc.testing.drawn_cache(GEOMETRY, 600, seed=9))
    calibrator.finish().save(other)
    run = kvtc_command("verify", files.stream, "-c", other)
    assert run.status == 1
    assert "the stream was written with calibration" in run.err


def alter(files: SimpleNamespace, **changes: Any) -> PlainSection:
    whole: dict[str, Any] = {"k": files.k.copy(), "v": files.v.copy(), **changes}
    return PlainSection(**whole)


def with_changed(array: np.ndarray, token: int) -> np.ndarray:
    changed = array.copy()
    changed[0, 0, token] *= -100
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"k": with_changed(f.k, 1)}, "section 0, tokens 0 to 3: K of verbatim tokens"),
        (lambda f: {"v": with_changed(f.v, 299)}, "V of verbatim tokens differs"),
        (lambda f: {"k": with_changed(f.k, 70)}, "tokens 68 to 131: K of token 70 differs"),
        (lambda f: {"v": with_changed(f.v, 200)}, "V of token 200 differs"),
        (lambda f: {"positions": np.arange(1, 301)}, "the positions differ from those in"),
        (lambda f: {"k": f.k[:, :, :9], "v": f.v[:, :, :9]}, "it is not what was encoded"),
        (
            lambda f: {"k": f.k.astype(np.float32), "v": f.v.astype(np.float32)},
            "of float32, the stream",
        ),
    ],
)
def test_verify_against_another_cache(tmp_path, kvtc_command, files, change, message):
    other = tmp_path / "other.npz"
    plain.write(other, [alter(files, **change(files))])
    run = kvtc_command("verify", files.stream, "-c", files.calibration, "--against", other)
    assert run.status == 1
    assert message in run.err
    plain.write(other, [alter(files)])
    run = kvtc_command("verify", files.stream, "-c", files.calibration, "--against", other)
    assert run.status == 0
    assert "equal bit for bit" in run.out


def rewritten(data: bytes, path, measure: Measure) -> None:
    """A stream whose errors were measured on something else, as older writers did."""
    stream = StreamFile(io.BytesIO(data))
    writer = StreamWriter(stream.header)
    with open(path, "wb") as file:
        file.write(writer.start())
        for block in stream.read_blocks(stream.index):
            if block.errors.measure is not Measure.NONE:
                block = replace(block, errors=BlockErrors(measure, *block.errors.values))
            file.write(writer.block(block))
        file.write(writer.finish())


def test_verify_knows_errors_of_coefficients(tmp_path, kvtc_command, files):
    calibration = kvtc.Calibration.load(files.calibration)
    codec = kvtc.Codec(calibration, "paper", ratio=6)
    rewritten(kvtc.encode(files.k, files.v, codec), tmp_path / "x.kvtc", Measure.COEFFICIENTS)
    run = kvtc_command(
        "verify", tmp_path / "x.kvtc", "-c", files.calibration, "--against", files.cache
    )
    assert run.status == 0, run.err


def test_verify_against_needs_a_calibration(kvtc_command, files):
    run = kvtc_command("verify", files.stream, "--against", files.cache)
    assert run.status == 2
    assert "--against needs -c" in run.err


# Streams of streams.


def test_edit_streams(tmp_path, kvtc_command, files):
    first, rest, whole = (tmp_path / f"{name}.kvtc" for name in ("first", "rest", "whole"))
    run = kvtc_command("truncate", files.stream, "--tokens", 100, "-o", first, "--json")
    assert (run.status, run.json["tokens"], run.err) == (0, 100, "")
    assert kvtc_command("slice", files.stream, "--tokens", "100:", "-o", rest).status == 0
    run = kvtc_command("cat", first, rest, "-o", whole)
    assert (run.status, run.err) == (0, "")
    assert f"{TOKENS} tokens" in run.out
    for stream, tokens in ((files.stream, slice(None)), (whole, slice(None)), (first, slice(100))):
        back = tmp_path / "back.npz"
        run = kvtc_command("decode", stream, "-c", files.calibration, "-o", back)
        assert (run.status, run.err) == (0, "")
        (found,) = plain.read(back)
        if stream == files.stream:
            exact = found
        assert equal_bits(found.k, np.ascontiguousarray(exact.k[:, :, tokens]))
    run = kvtc_command("slice", first, "--positions", "2:9", "-o", first, "--json")
    assert run.json["tokens"] == 7
    assert kvtc_command("verify", first, "-c", files.calibration).status == 0
    data = files.stream.read_bytes()
    rest.write_bytes(data[: len(data) // 2])
    assert kvtc_command("cat", rest, "-o", whole).status == 1
    run = kvtc_command("repair", rest, "-o", whole)
    assert (run.status, run.err) == (0, "")
    assert "the stream ends after" in " ".join(run.out.split())
    assert kvtc_command("verify", whole).status == 0
    run = kvtc_command("slice", whole, "--layers", "0:1", "-o", first)
    assert run.status == 1
    assert "layers are coded in groups (0 to 2)" in " ".join(run.err.split())
    run = kvtc_command("slice", whole, "--heads", "0:1", "-o", first)
    assert run.status == 1
    assert "KV heads cannot be cut out" in run.err
    assert kvtc_command("truncate", whole, "--tokens", -1, "-o", first).status == 2


def test_split_and_join_by_layers(tmp_path, kvtc_command, files):
    calibration, whole, again = (tmp_path / n for n in ("c.safetensors", "w.kvtc", "a.kvtc"))
    options = ("--rope-theta", 10_000, "--layer-groups", 3, "-o", calibration)
    assert kvtc_command("calibrate", files.cache, *options).status == 0
    options = ("-c", calibration, "-o", whole, "--ratio", 4, "--window", 16)
    assert kvtc_command("encode", files.cache, *options).status == 0
    parts = tmp_path / "part-{}.kvtc"
    run = kvtc_command("split", whole, "--at", 1, 2, "-o", parts, "--json")
    assert (run.status, run.err) == (0, "")
    assert [part["layers"] for part in run.json["streams"]] == ["0 to 0", "1 to 1", "2 to 2"]
    paths = [tmp_path / f"part-{i}.kvtc" for i in range(3)]
    for path in paths:
        assert kvtc_command("verify", path, "-c", calibration).status == 0
        assert kvtc_command("info", path, "-c", calibration).status == 0
    run = kvtc_command("join", *paths, "-o", again)
    assert (run.status, run.err) == (0, "")
    for stream, layers in ((whole, slice(None)), (again, slice(None)), (paths[1], slice(1, 2))):
        back = tmp_path / "back.npz"
        assert kvtc_command("decode", stream, "-c", calibration, "-o", back).status == 0
        (found,) = plain.read(back)
        if stream == whole:
            exact = found
        assert np.allclose(
            np.asarray(found.k, np.float32), np.asarray(exact.k[layers], np.float32), rtol=1e-2
        )
    assert kvtc_command("split", whole, "--at", 1, "-o", tmp_path / "no number").status == 2


def test_encode_appends(tmp_path, kvtc_command, files):
    out = tmp_path / "a.kvtc"
    options = ("-c", files.calibration, "-o", out, "--window", 16, "--append")
    for count in (1, 2):
        if count == 2:
            (found,) = plain.read(files.cache)
            positions = np.arange(TOKENS, 2 * TOKENS)
            cache = tmp_path / "more.safetensors"
            plain.write(cache, [replace(found, positions=positions)])
        run = kvtc_command("encode", files.cache if count == 1 else cache, *options, "--json")
        assert (run.status, run.json["tokens"]) == (0, count * TOKENS)
    assert kvtc_command("verify", out, "-c", files.calibration).status == 0
    run = kvtc_command("encode", cache, *options, "--metadata", '{"a": 1}')
    assert (run.status, "for new streams" in run.err) == (2, True)
    run = kvtc_command("encode", cache, *options)
    assert (run.status, "positions" in run.err) == (1, True)


def test_encode_takes_over_blocks_of_a_base(tmp_path, kvtc_command, files):
    restored = tmp_path / "restored.safetensors"
    given = ("-c", files.calibration, "--preset", "paper", "--ratio", 6, "--window", 16,
             "--block-tokens", 64)  # fmt: skip
    assert kvtc_command("decode", files.stream, *given[:2], "-o", restored).status == 0
    (exact,) = plain.read(restored)
    out = tmp_path / "again.kvtc"
    for base in (files.stream, out):  # another stream, and the one that is replaced
        run = kvtc_command("encode", restored, *given, "-o", out, "--base", base)
        assert (run.status, run.err) == (0, "")
        back = tmp_path / "back.safetensors"
        assert kvtc_command("decode", out, *given[:2], "-o", back).status == 0
        (found,) = plain.read(back)
        assert equal_bits(found.k, exact.k)
        assert equal_bits(found.v, exact.v)
    run = kvtc_command("encode", files.cache, *given, "-o", out, "--base", files.stream)
    assert "no block of base could be taken over" in run.err
    run = kvtc_command("encode", restored, *given, "-o", out, "--base", out, "--append")
    assert (run.status, "--base is for new streams" in run.err) == (2, True)
    run = kvtc_command("encode", restored, *given, "-o", out, "--base", files.cache)
    assert run.status == 1
    assert run.err.startswith(f"kvtc: error: {files.cache}: ")


def test_verify_reads_what_was_appended(tmp_path, kvtc_command, files):
    path = tmp_path / "a.kvtc"
    path.write_bytes(files.stream.read_bytes())
    codec = kvtc.Codec(
        kvtc.Calibration.load(files.calibration), "paper", ratio=6, window=16, block_tokens=64
    )
    with kvtc.open(path, "ab", codec=codec) as writer:
        writer.write(files.k, files.v)
    run = kvtc_command("verify", path, "-c", files.calibration, "--json")
    assert (run.status, run.json["tokens"]) == (0, 2 * TOKENS)
    data = bytearray(path.read_bytes())
    data[files.stream.stat().st_size - 5] ^= 1  # the old trailer
    path.write_bytes(data)
    assert kvtc_command("verify", path).status == 1


# All commands.


def test_version(kvtc_command):
    assert kvtc_command("--version").out == f"kvtc-stream {kvtc.__version__}\n"


def test_without_a_command_the_use_is_shown(kvtc_command):
    run = kvtc_command()
    assert run.status == 2
    assert run.err.startswith("usage: kvtc")


def test_debug_shows_the_traceback(kvtc_command):
    with pytest.raises(FileNotFoundError):
        kvtc_command("info", "missing", "--debug")


def test_long_work_says_in_a_log_where_it_is(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_SECONDS_PER_LINE", 0.05)
    with terminal.progress() as bars:
        advance = terminal.bar(bars, "Reading")
        advance(1, 4)
        time.sleep(0.5)
        advance(4, 4)  # what is made of it may take long
        time.sleep(1.5)
    told = capsys.readouterr().err
    assert "Reading: 25 %, 0 s so far\n" in told
    assert re.search(r"Reading: [1-9]\d* s so far\n", told)
    assert bars.tasks[0].finished_time is None  # it pulses


# Clumsy uses.


def test_ranges_from_the_end_need_no_equals_sign(tmp_path, kvtc_command, files):
    back = tmp_path / "back.npz"
    run = kvtc_command(
        "decode", files.stream, "-c", files.calibration, "-o", back, "--tokens", "-30:-10",
        "--layers", "-2:",
    )  # fmt: skip
    assert (run.status, run.err) == (0, "")
    assert plain.read(back)[0].k.shape == (2, 2, 20, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slice", "--tokens", "100:50"], "--tokens 100:50 holds none"),
        (["slice", "--tokens", "0:301"], "there are 300 tokens"),
        (["slice", "--layers", "3:4"], "there are 3 layers"),
        (["slice", "--positions", "300:400"], "they are at 0 to 299"),
        (["truncate", "--tokens", "301"], "there are 300 tokens, fewer than 301"),
        (["split", "--at", "3"], "--at 3 is no place to cut: layers are 0 to 2"),
    ],
)
def test_edits_refuse_ranges_without_tokens(
    tmp_path, kvtc_command, files, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    run = kvtc_command(command, files.stream, *options, "-o", "out-{}.kvtc")
    assert run.status == 1
    assert run.err.startswith(f"kvtc: error: {files.stream}: ")
    assert message in run.err
    assert not list(tmp_path.iterdir())


def test_a_pipe_that_ends_early_is_an_error(tmp_path, kvtc_command, files, monkeypatch):
    back = tmp_path / "back.npz"
    for tokens in ("290:310", "300:"):
        with files.stream.open("rb") as file:
            pipe = SimpleNamespace(buffer=SimpleNamespace(read=file.read, seekable=lambda: False))
            monkeypatch.setattr(sys, "stdin", pipe)
            options = ("-c", files.calibration, "-o", back, "--tokens", tokens)
            run = kvtc_command("decode", "-", *options)
        assert run.status == 1
        assert f"--tokens {tokens} goes beyond the end of the stream" in run.err
        assert not back.exists()


def test_no_advice_to_unpickle(tmp_path, kvtc_command, files):
    text, objects = tmp_path / "text.npz", tmp_path / "objects.npz"
    text.write_text("hello")
    np.savez(objects, k=np.array([{}], object), v=np.array([{}], object))
    for path, reason in ((text, "as zip files do"), (objects, "it holds Python objects")):
        run = kvtc_command("encode", path, "-c", files.calibration, "-o", tmp_path / "x.kvtc")
        assert run.status == 1
        assert f"{path} is not a readable .npz file: " in run.err
        assert reason in run.err
        assert "allow_pickle" not in run.err


def test_positions_beyond_int64_are_named_as_they_are(tmp_path, kvtc_command, files):
    cache = tmp_path / "far.npz"
    positions = np.arange(TOKENS, dtype=np.uint64) + 2**63
    np.savez(cache, k=files.k.astype(np.float32), v=files.v.astype(np.float32), positions=positions)
    run = kvtc_command("encode", cache, "-c", files.calibration, "-o", tmp_path / "x.kvtc")
    assert run.status == 1
    assert f"far.npz: positions go up to {2**63 + TOKENS - 1}, expected at most" in run.err


def test_errors_name_the_file(tmp_path, kvtc_command, files):
    k, v = np.asarray(files.k, np.float32), np.asarray(files.v, np.float32)
    bad, falling, stream = (tmp_path / n for n in ("bad.npz", "falling.npz", "x.kvtc"))
    np.savez(bad, k=k[:, :1], v=v[:, :1])
    np.savez(falling, k=k, v=v, positions=np.arange(TOKENS)[::-1])
    for cache, message in ((bad, "has k [3, 1, 300, 8]"), (falling, "expected strictly rising")):
        run = kvtc_command("encode", cache, "-c", files.calibration, "-o", stream)
        assert run.status == 1
        assert run.err.startswith(f"kvtc: error: {cache}")
        assert message in run.err
    out = tmp_path / "y.kvtc"
    offset, length = block_offsets(files.stream)[1]
    changed = bytearray(files.stream.read_bytes())
    changed[offset + length // 2] ^= 1
    stream.write_bytes(changed)
    run = kvtc_command("cat", stream, files.stream, "-o", out)
    assert (run.status, run.err.startswith(f"kvtc: error: {stream}: tokens ")) == (1, True)
    assert ": record 1 (BLOCK) at byte " in run.err
    stream.write_bytes(files.stream.read_bytes()[:-50])
    for arguments in (
        ["cat", files.stream, stream, "-o", out],
        ["truncate", stream, "--tokens", 5, "-o", out],
        ["info", stream],
        ["decode", stream, "-c", files.calibration, "-o", tmp_path / "back.npz"],
    ):
        run = kvtc_command(*arguments)
        assert run.status == 1
        assert run.err.startswith(f"kvtc: error: {stream}: ")


def test_a_text_that_is_not_utf8_is_named(tmp_path, kvtc_command):
    good, latin = tmp_path / "good.txt", tmp_path / "latin.txt"
    good.write_text("café", encoding="utf-8")
    latin.write_bytes("café".encode("latin-1"))
    cal = tmp_path / "c.safetensors"
    run = kvtc_command("calibrate", "--model", "m", "--text", good, latin, "-o", cal)
    assert run.status == 1
    assert f"{latin} is no UTF-8 text" in run.err


def test_the_input_is_not_written_over(tmp_path, kvtc_command, files):
    cache, link = tmp_path / "cache", tmp_path / "link0"
    cache.write_bytes(files.cache.read_bytes())
    link.symlink_to(cache)
    for arguments in (
        ["encode", cache, "--format", "safetensors", "-c", files.calibration, "-o", link],
        ["decode", files.stream, "--format", "safetensors", "-c", cache, "-o", link],
        ["calibrate", cache, "--rope", "none", "-o", cache],
        ["split", cache, "--at", 1, "-o", tmp_path / "link{}"],
    ):
        run = kvtc_command(*arguments)
        assert (run.status, "is read and written" in run.err) == (2, True)
    assert cache.read_bytes() == files.cache.read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_outputs_that_lack_characters_change_no_status(files, encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["info", str(files.stream)]) == 0
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)
    assert "layers 0-2" in shown
    assert "?" not in shown
    assert out.errors == "strict"


def test_named_pipes(tmp_path, kvtc_command, files):
    """Streams, caches and calibrations, in and out."""

    def fed(path: Path) -> Path:
        pipe = tmp_path / f"pipe{next(number)}"
        os.mkfifo(pipe)
        threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()), daemon=True).start()
        return pipe

    number = itertools.count()
    cal, out, back = files.calibration, tmp_path / "out.kvtc", tmp_path / "back.npz"
    for arguments in (
        ["encode", fed(files.cache), "--format", "safetensors", "-c", fed(cal), "-o", out],
        ["decode", fed(files.stream), "-c", cal, "-o", back],
        ["verify", fed(files.stream), "-c", fed(cal)],
        ["info", fed(files.stream)],
        ["info", fed(cal)],
        ["truncate", fed(files.stream), "--tokens", 100, "-o", out],
        ["cat", fed(files.stream), "-o", out],
        ["repair", fed(files.stream), "-o", out],
        ["slice", fed(files.stream), "--positions", "5:60", "-o", out],
    ):
        run = kvtc_command(*arguments)
        assert (run.status, run.err) == (0, ""), arguments
    assert kvtc_command("info", out, "--json").json["tokens"] == 55

    pipe, taken = tmp_path / "to", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: taken.append(pipe.read_bytes()))
    reader.start()
    run = kvtc_command("truncate", files.stream, "--tokens", 100, "-o", pipe)
    reader.join(30)
    assert (run.status, run.err) == (0, "")
    kvtc_command("truncate", files.stream, "--tokens", 100, "-o", out)
    assert taken == [out.read_bytes()]


def test_process_substitution(files):
    """What a shell names /dev/fd/63."""
    read, write = os.pipe()
    taken: list[bytes] = []
    with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb") as other:
        reader = threading.Thread(target=lambda: taken.append(pipe.read()))
        reader.start()
        name = f"/dev/fd/{other.fileno()}"
        assert main(["truncate", str(files.stream), "--tokens", "100", "-o", name]) == 0
        other.close()
        reader.join(30)
    assert taken[0].startswith(files.stream.read_bytes()[:4])


def test_compact(tmp_path, kvtc_command, files):
    path, out = tmp_path / "a.kvtc", tmp_path / "b.kvtc"
    path.write_bytes(files.stream.read_bytes())
    codec = kvtc.Codec(
        kvtc.Calibration.load(files.calibration), "paper", ratio=6, window=16, block_tokens=64
    )
    with kvtc.open(path, "ab", codec=codec) as writer:
        writer.write(files.k, files.v)
    appended = path.stat().st_size
    run = kvtc_command("compact", path, "-o", out, "--json")
    assert (run.status, run.err, run.json["tokens"]) == (0, "", 2 * TOKENS)
    assert path.stat().st_size == appended > out.stat().st_size == run.json["bytes"]
    run = kvtc_command("compact", path)
    assert (run.status, run.err) == (0, "")
    assert path.read_bytes() == out.read_bytes()


def commands(parser: argparse.ArgumentParser, name: str = "kvtc") -> dict[str, Any]:
    """Every command by what one types, but for those that only have commands of their own."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        return {name: parser}
    return {
        full: command
        for word, inner in groups[0].choices.items()
        for full, command in commands(inner, f"{name} {word}").items()
    }


def test_every_command_and_option_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    found = commands(make_parser())
    sections = dict(re.findall(r"^## (kvtc [a-z ]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert sections.keys() == found.keys()
    for name, command in found.items():
        options = [o for action in command._actions for o in action.option_strings]
        missing = set(options) - {"-h", "--help", "--json", "--debug"}
        missing -= set(re.findall(r"`(--?[a-z-]+)`", sections[name]))
        assert not missing, name
        stale = set(re.findall(r"^\| `(--[a-z-]+)`", sections[name], re.M)) - set(options)
        assert not stale, name
        examples = re.findall(r"^\$ (.*)$", sections[name], re.M)
        assert any(f"{name} " in f"{example} " for example in examples), name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(kvtc_command, shell):
    pytest.importorskip("shtab")
    run = kvtc_command("completion", shell)
    assert (run.status, run.err) == (0, "")
    for word in ("calibrate", "error-bound", "quality"):
        assert word in run.out


def test_a_missing_library_names_the_extra(kvtc_command, monkeypatch, files):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    for module in ("terminal", "info", "report"):
        monkeypatch.delitem(sys.modules, f"kvtc_stream.cli.{module}", raising=False)
    run = kvtc_command("info", files.stream)
    assert (run.status, "pip install 'kvtc-stream[cli]'" in run.err) == (1, True)
