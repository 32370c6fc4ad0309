"""The auditor's side of Secure FedCoLLM: may read everything, is imported by nothing."""
