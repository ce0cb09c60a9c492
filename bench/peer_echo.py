"""What gRPC for Python takes by itself: a server that answers the same bytes to every request. peer_echo.py PORT FILE.

It decodes no request, makes no response and computes nothing.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

METHOD = "/echo.Echo/Answer"


def main(port: str, answer: bytes) -> None:
    """Serve until killed."""
    server = grpc.server(ThreadPoolExecutor(4))
    service, _, method = METHOD.strip("/").partition("/")
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).read_bytes())
