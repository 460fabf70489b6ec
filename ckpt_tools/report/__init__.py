"""Results as text for a terminal, pages for a browser or CI summary, and records for programs."""
