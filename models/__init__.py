"""Reference models: PyTorch definition, exported graph, weights made from a seed."""
