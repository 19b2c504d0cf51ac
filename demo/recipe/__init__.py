"""How the demo model was trained and judged: data, VAE, UNet with text encoders, evaluation. See README.md here."""
