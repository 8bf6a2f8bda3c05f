"""cortexd: a machine, or many, as one OpenAI- and Anthropic-compatible LLM service."""

__version__ = "0.1.0"
