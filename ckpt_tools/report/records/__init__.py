"""Results as records for programs: JSON, and the manifest of a folder."""
