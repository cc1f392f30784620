"""kvtc-stream."""
