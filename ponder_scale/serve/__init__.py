"""Serve pondering models with vLLM. Nothing else in the package imports vLLM."""
