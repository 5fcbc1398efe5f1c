"""Arrays and bytes in the files of a checkpoint."""
