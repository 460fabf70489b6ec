"""Adapters: model libraries as ckpt_tools sees them."""
