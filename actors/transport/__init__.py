"""How messages travel between processes; the only package that knows zmq."""
