"""The KV memory of one model: blocks, state slots, kept prefixes, and how large all of it is."""
