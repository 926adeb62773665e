"""Whether a host's name or address is this machine itself, which no other can reach."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Of a name, or of an address with or without brackets."""
    name = host.lower().rstrip(".").removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
