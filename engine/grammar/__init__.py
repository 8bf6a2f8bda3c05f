"""Structured output: what an answer may be, as a grammar, and which tokens it allows next.

`schema` checks what clients send, `source` and `calls` write grammars, `matcher` is the only module
that knows the library behind them, `compiler` serves the engine and `check` the fronts. No torch.
"""
