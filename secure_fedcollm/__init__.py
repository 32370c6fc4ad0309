"""Secure FedCoLLM: private, encrypted, federated co-tuning of a large and a small language model."""
