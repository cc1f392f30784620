"""README and documentation: their Python runs, the reference has every public name, links lead
somewhere, and the figures are those that their script draws."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest

import kvtc_stream as kvtc
from kvtc_stream import integrations

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]


def blocks(page: Path) -> list[str]:
    """Its Python, but what is marked ``python notest``: that needs a GPU, a network or a host."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore::kvtc_stream.KVTCWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name_of)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in order, as one program; a tiny model stands for those of a hub."""
    program = "\n".join(blocks(page))
    if "transformers" in program:
        pytest.importorskip("transformers")
        _tiny_model_for_every_name(tmp_path / "model", monkeypatch)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, name_of(page), "exec"), {"__name__": "__main__"})


def _tiny_model_for_every_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from tiny_model import save_tiny_model

    save_tiny_model(folder)
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        load = loader.from_pretrained
        monkeypatch.setattr(
            loader, "from_pretrained", lambda name, load=load, **options: load(folder)
        )


def documented() -> set[str]:
    """Names that the reference has an entry for."""
    pages = (DOCS / "reference").glob("*.md")
    return {n for p in pages for n in re.findall(r"^::: (\S+)$", p.read_text("utf-8"), re.M)}


def public() -> set[str]:
    """Names that users may rely on, those of each host among them."""
    names = {f"kvtc_stream.{name}" for name in kvtc.__all__}
    for path in Path(integrations.__path__[0]).iterdir():
        if path.name.startswith("_") or (path.is_file() and path.suffix != ".py"):
            continue
        host = f"kvtc_stream.integrations.{path.stem}"
        try:
            names |= {f"{host}.{name}" for name in importlib.import_module(host).__all__}
        except ImportError:  # a host that is not installed; where it is, its names count
            names |= {name for name in documented() if name.startswith(f"{host}.")}
    return names


def test_reference_has_every_public_name() -> None:
    assert documented() == public()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative ones, in the repository; the site's build checks its own."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^()\s:#]+)(?:#[^()\s]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_figures_are_drawn_by_their_script(tmp_path: Path) -> None:
    """And so the house has the floors that are enforced."""
    (tmp_path / "tests").mkdir()
    shutil.copytree(DOCS / "figures", tmp_path / "docs" / "figures")
    shutil.copy(ROOT / "tests" / "test_house.py", tmp_path / "tests")
    drawn = tmp_path / "docs" / "figures"
    for figure in drawn.glob("*.svg"):
        figure.unlink()
    runpy.run_path(os.fspath(drawn / "draw.py"), run_name="__main__")
    figures = {p.name: p.read_bytes() for p in (DOCS / "figures").glob("*.svg")}
    assert {p.name: p.read_bytes() for p in drawn.glob("*.svg")} == figures


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == kvtc.__version__
