"""Kill runs at random moments, and check what they leave behind."""
