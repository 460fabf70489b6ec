"""What an object read from a file means: state dicts, recorded settings, averaged copies."""
