"""A router's address translation in userspace: `python -m tests.support.forwarder HOST PORT...`.

Listens on every port at all addresses of its namespace and carries bytes to HOST's same port, so
that HOST sees the router's address only. It prints a line when all ports listen.
"""

from __future__ import annotations

import asyncio
import sys


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()


async def main(host: str, ports: list[int]) -> None:
    async def listen(port: int) -> asyncio.Server:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                back, out = await asyncio.open_connection(host, port)
            except OSError:
                writer.close()
                return
            await asyncio.gather(_pump(reader, out), _pump(back, writer))

        return await asyncio.start_server(accept, "0.0.0.0", port)  # noqa: S104

    servers = [await listen(port) for port in ports]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [int(port) for port in sys.argv[2:]]))
