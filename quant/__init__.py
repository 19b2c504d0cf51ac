"""The algorithms: pure torch. Knows no engine, no kernel and no node."""
