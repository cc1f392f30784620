"""What the site takes from outside of docs/, and links that work there and in the repository.

Pages link to each other, to other documents and to results by their paths in the repository, so
that a reader of the repository can follow them too; here they become the site's.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]

#: Paths in the repository, and in the site.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "guides/security.md",
    "formats/SPEC.md": "format/spec.md",
    "formats/kvtc.ksy": "format/kvtc.ksy",
    **{
        f"benchmarks/results/{path.name}": f"results/data/{path.name}"
        for path in sorted((ROOT / "benchmarks/results").iterdir())
    },
}
IN_REPOSITORY = {site: path for path, site in ELSEWHERE.items()}

LINK = re.compile(r"(?<=\]\()(?P<path>[^()\s:#]+)(?P<anchor>#[^()\s]*)?(?=\))")

_package = tempfile.TemporaryDirectory(prefix="kvtc-docs-")


@event_priority(100)  # before mkdocstrings looks at its options
def on_config(config: Any) -> Any:
    """mkdocstrings finds the package as it is installed: ``formats`` and ``gpu`` inside of it."""
    package = Path(_package.name) / "kvtc_stream"
    for source, target in (("kvtc_stream", ""), ("formats", "formats"), ("gpu", "gpu")):
        shutil.copytree(ROOT / source, package / target, dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_package.name]
    config.watch += [str(ROOT / name) for name in ("kvtc_stream", "formats", "gpu")]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Documents and results from outside of docs/."""
    for path, site in ELSEWHERE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links from a path in the repository to another."""
    site = page.file.src_uri
    folder = posixpath.dirname(IN_REPOSITORY.get(site, f"docs/{site}"))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        found = ELSEWHERE.get(target, target.removeprefix("docs/"))
        if not files.get_file_from_path(found):
            return match[0]  # mkdocs says that it leads nowhere
        return posixpath.relpath(found, posixpath.dirname(site) or ".") + (match["anchor"] or "")

    return LINK.sub(moved, markdown)
