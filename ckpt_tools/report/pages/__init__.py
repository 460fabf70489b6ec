"""Results as pages for a browser or a CI summary: HTML and Markdown from the same content."""
