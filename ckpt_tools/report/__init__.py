"""Results as text for a terminal, as pages for a browser or a CI summary, and as records for programs."""
