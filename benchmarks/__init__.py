"""The measurements behind the documentation's claims; see README.md."""
