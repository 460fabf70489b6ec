"""Ray on this machine alone: its servers listen on the loopback interface and ask for a token.

Ray runs the code that it is sent. By default its servers listen on every interface
(https://docs.ray.io/en/latest/ ray-security/index.html), which is right for a cluster and wrong for
one run on one machine.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckpt_tools.errors import ClusterError

__all__ = ["loopback_cluster", "read_authentication", "require_loopback", "temporary_environment"]

# Ray's switch for systems on which it starts no clusters of several machines. All its servers take
# the node's address as a sign, and with this switch off, that is the loopback address
# (get_node_ip_address in ray/_private/services.py).
_SWITCH, _CONSTANT = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "ENABLE_RAY_CLUSTER"
_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", Path("~/.ray/auth_token")


@contextlib.contextmanager
def loopback_cluster() -> Iterator[None]:
    """Settings with which ``ray.init`` starts servers for this machine and this user alone.

    Ray's processes inherit them, so they need not last longer than the start; what this process had
    is restored. A token, or a mode of authentication, that the user has set up is used as it is.
    Ray before 2.52 has no tokens.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = getattr(constants, _CONSTANT, None)
    with temporary_environment(**{_SWITCH: "0"}, **_authentication()):
        setattr(constants, _CONSTANT, False)  # read from the environment when Ray was imported
        read_authentication()
        try:
            yield
        finally:
            setattr(constants, _CONSTANT, before)


def require_loopback(ray: Any) -> None:
    """Raise ClusterError unless the connected cluster is one of this machine's loopback interface.

    The settings that lead there are internals of Ray, so this checks what they led to.
    """
    for node in ray.nodes():
        address = node["NodeManagerAddress"]
        if not ipaddress.ip_address(address).is_loopback:
            raise ClusterError(
                f"expected Ray {ray.__version__} to listen on the loopback interface alone, "
                f"found {address}. Where the network is safe, start it yourself (ray start "
                "--head) and give --ray-address auto."
            )


def read_authentication() -> None:
    """Let Ray read mode and token of authentication from the environment again.

    Otherwise Ray keeps for the whole process what it has read first.
    """
    raylet: Any = importlib.import_module("ray._raylet")
    if hasattr(raylet, "AuthenticationTokenLoader"):
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def temporary_environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the block.

    At its end all variables are as they were, also those that Ray changes of its own accord.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _authentication() -> dict[str, str]:
    """A random token for the servers of this run, unless the user has one or wants none.

    Children inherit it in the environment, which other users of the machine cannot read, unlike
    arguments. Without it newer versions of Ray would write a token into the user's home folder.
    https://docs.ray.io/en/latest/ray-security/token-auth.html
    """
    if os.environ.get(_MODE, "token").lower() != "token":
        return {}
    user_has_token = any(os.environ.get(name) for name in (_TOKEN, f"{_TOKEN}_PATH"))
    if user_has_token or _TOKEN_FILE.expanduser().is_file():
        return {_MODE: "token"}
    return {_MODE: "token", _TOKEN: secrets.token_hex(32)}
