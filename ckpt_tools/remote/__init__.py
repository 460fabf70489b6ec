"""Files behind URLs, through fsspec: stores, local copies, uploads."""
