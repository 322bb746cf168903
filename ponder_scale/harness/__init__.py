"""lm-evaluation-harness: find its tasks, and share its work on one model among ranks."""
