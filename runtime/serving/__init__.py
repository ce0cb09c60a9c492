"""Serving without a wire: requests as dataclasses, one queue and one engine per lane, models by name, their health.

Services in `runtime.wire` translate between this and their protocol, and own no engine and no thread.
"""
