"""Side-by-side measurements. Run: python -m bench NAME."""
