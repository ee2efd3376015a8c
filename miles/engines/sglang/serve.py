"""A real SGLang server, made safe to start from Miles. Runs under the interpreter that has sglang, which need not have Miles:

    python serve.py --model-path DIR --port 0 ...       SGLang's own arguments, host, port and keys excepted

- The token comes in MILES_ENGINE_TOKEN, not on the command line, and is taken out of what SGLang logs. It is asked for on every
  endpoint, those that change weights included.
- `--port 0` takes a port that the system picks and holds it until the server has bound it: loading takes minutes, and nobody
  else gets the port meanwhile. The first line printed is `miles-engine port=N`.
- The server ends with whoever started it: when stdin closes, its process group is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading

_HOST = "127.0.0.1"


def main(argv: list[str]) -> None:
    token = os.environ.pop("MILES_ENGINE_TOKEN")
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    _keep_out_of_logs(token)
    port, argv = _take_port(argv)

    # Takes seconds; from here on the port is known and the parent's end is noticed.
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args([*argv, "--host", _HOST, "--port", str(port)])
    # Not as arguments: SGLang keeps, and tells, the command line that it was given.
    arguments.api_key = arguments.admin_api_key = token
    run_server(arguments)


def _take_port(argv: list[str]) -> tuple[int, list[str]]:
    at = argv.index("--port")
    wanted, rest = int(argv[at + 1]), argv[:at] + argv[at + 2 :]
    # Bound and never listening: with SO_REUSEADDR on both sides the server can bind beside it, others are refused.
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((_HOST, wanted))
    port = holder.getsockname()[1]
    _held.append(holder)
    print(f"miles-engine port={port}", flush=True)
    return port, rest


_held: list[socket.socket] = []


def _keep_out_of_logs(token: str) -> None:
    """SGLang logs all of its arguments, keys included."""
    make = logging.getLogRecordFactory()

    def without_token(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # a message that does not fit its arguments: for the handler to complain about
            return record
        if token in text:
            record.msg, record.args = text.replace(token, "<token>"), None
        return record

    logging.setLogRecordFactory(without_token)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
