"""What else the command does: adopt, plan, inspect."""
