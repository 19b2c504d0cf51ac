"""The command line: one file per command. Each parses, calls the library and prints; the methods live in quant, hosts and demo."""
