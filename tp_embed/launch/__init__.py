"""Who started this process, and where its ranks meet."""
