"""What the root process runs: it starts, watches, restarts and stops all others, and no model."""
