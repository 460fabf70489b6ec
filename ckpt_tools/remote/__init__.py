"""Files behind URLs, through fsspec: addresses, stores, local copies, delivery."""
