"""lm-evaluation-harness: its tasks found, its model shared out over ranks."""
