"""What a model's files say it is, and which tensors they must hold; pure and torch-free."""
