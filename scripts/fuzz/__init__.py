"""Feed damaged files to every reader: each must be read or refused with one clear error."""
