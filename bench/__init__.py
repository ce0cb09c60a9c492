"""Side-by-side measurements. Run: python -m bench [export|latency|grpc]."""
