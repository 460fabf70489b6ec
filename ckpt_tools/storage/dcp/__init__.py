"""Folders that torch.distributed.checkpoint (DCP) writes: metadata, shards, and their assembly."""
