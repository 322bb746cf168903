"""From texts to tokens, and from texts to a tokenizer."""
