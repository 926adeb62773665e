"""The clients of `served.py`, in a process of their own, so that their CPU time does not count.

Each line of stdin is a port and the bodies of some requests, which are sent at once. It is answered by a
line with the seconds until the last answer was there, and the tokens that the server counts.
"""

import asyncio
import json
import sys
import time
from typing import Any

COUNT = b'"completion_tokens":'  # in a whole answer, and at the end of a stream


async def ask(port: int, body: bytes) -> int:
    """Send one request and read its answer to the end; returns how many tokens were generated.

    Raises ValueError where the answer does not tell, with what it tells instead.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    if COUNT not in answer:
        raise ValueError(answer.rpartition(b"\r\n\r\n")[2].decode())
    return int(answer.rpartition(COUNT)[2].split(b",")[0])


async def ask_all(port: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """All of them at once."""
    ready = [json.dumps(body).encode() for body in bodies]
    began = time.perf_counter()
    try:
        tokens = await asyncio.gather(*(ask(port, body) for body in ready))
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    return {"seconds": time.perf_counter() - began, "tokens": sum(tokens)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(ask_all(**json.loads(line)))), flush=True)
