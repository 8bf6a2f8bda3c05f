"""Which tokens of which sequences a step computes, and what their owners are told."""
