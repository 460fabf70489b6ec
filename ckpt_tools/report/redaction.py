"""What a report may show of a value."""

from ckpt_tools.redaction import presentable, without_secrets

__all__ = ["presentable", "without_secrets"]
