"""The HTTP side: OpenAI API and neuron API over the actors' messages."""
