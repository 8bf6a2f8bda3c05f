"""From logits to tokens, on the host or on the device, and the scores of prompts."""
