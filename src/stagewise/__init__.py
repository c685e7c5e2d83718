"""Which training data mattered for what, and when."""
