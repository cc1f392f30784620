"""What mkdocstrings does not do by itself: roles become links, and names that share a description
(``k, v``) do not repeat it."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Works on every docstring once it is known, in numpydoc's style."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """An object whose members are known."""
        if obj.docstring is None:
            return
        owner = obj if obj.is_class else obj.parent

        def link(match: re.Match[str]) -> str:
            """A link to what the reference has, plain code to what it has not."""
            name = match[1]
            if "." in name:
                target = name
            elif name[0].islower() and owner is not None and owner.is_class:
                target = f"{owner.path}.{name}"
            else:
                target = f"{_public(obj)}.{name}"
            shown = name.removeprefix("kvtc_stream.")
            return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'

        obj.docstring.value = ROLE.sub(link, obj.docstring.value)
        obj.docstring.parser = "numpy"
        for section in obj.docstring.parsed:
            if section.kind is not griffe.DocstringSectionKind.parameters:
                continue
            first = None
            for parameter in section.value:
                if first is not None and parameter.description == first.description:
                    parameter.description = f"See `{first.name}`."
                else:
                    first = parameter


def _public(obj: griffe.Object) -> str:
    """Where a name beside this object is public: in the package, or in a host's."""
    path = obj.path.split(".")
    return ".".join(path[: 3 if path[1] == "integrations" else 1])
