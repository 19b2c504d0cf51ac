"""The demo model: a small SDXL trained from scratch on captioned emoji scenes. Imports nothing until a module is asked for."""
