"""Results as records for programs: as JSON, and as the lines of a manifest."""
