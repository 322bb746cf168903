"""Turn texts into tokens, and train tokenizers on texts."""
