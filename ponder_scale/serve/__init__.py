"""Pondering models inside vLLM: the one room that imports it."""
