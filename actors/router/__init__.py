"""The router actor and its parts: what runs where, on this host and in the fleet."""
