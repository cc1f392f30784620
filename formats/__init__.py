"""The container: values, bytes, readers and writers. SPEC.md is normative."""
