"""The trusted base of Secure FedCoLLM: everything a privacy reviewer must read, and nothing else of ours."""
