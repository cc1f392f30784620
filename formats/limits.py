"""Limits on the sizes in a stream, checked before memory is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from kvtc_stream.errors import LimitError


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes above which a reader refuses a stream with :class:`~kvtc_stream.errors.LimitError`.

    The defaults fit every model known to us and keep a hostile stream from taking more than about
    two gigabytes. They are the reader's choice, not part of the format.

    Parameters
    ----------
    max_header_bytes, max_metadata_bytes
        The header, and the user's JSON text in it.
    max_record_bytes
        The payload of one record.
    max_block_bytes
        Coded symbols, or verbatim values, of one block after decompression.
    max_block_tokens
        Tokens of one block.
    max_records
        Records of one stream.
    max_sections, max_layers
        Sections of a stream, layers in all of them.
    max_width
        Values of K and V per token in one section.
    max_bands
        Parts and bands of a plan, all sections together.
    """

    max_header_bytes: int = 1 << 24
    max_metadata_bytes: int = 1 << 20
    max_record_bytes: int = 1 << 30
    max_block_bytes: int = 1 << 30
    max_block_tokens: int = 1 << 16
    max_records: int = 1 << 20
    max_sections: int = 1 << 8
    max_layers: int = 1 << 12
    max_width: int = 1 << 22
    max_bands: int = 1 << 20

    def check(self, name: str, found: int, what: str) -> None:
        """Raise ``LimitError`` when ``found`` exceeds the limit called ``name``."""
        limit = getattr(self, name)
        if found > limit:
            raise LimitError(
                f"{what} is {found}, the limit is {limit}; "
                f"if you trust the source, read with Limits({name}={found})"
            )
