"""What tried to leave the node. Nothing ever gets out; this says what would have, which is how an installation without a network is tested.

Addresses are those of packets that the node's filter turns back (pods) or sees on their way to nowhere (the node's own components), names
are those that were asked of the cluster's DNS and are none of the cluster's.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gantline_devcluster.control_plane import SERVICE_CIDR
from gantline_devcluster.node.layout import DNS_DOMAIN, NODE_NETWORK, POD_CIDR
from gantline_devcluster.node.requirements import SYSTEM_PATH

__all__ = ["DNS_LOG", "NO_WAY_OUT", "parse_addresses", "parse_names", "read_addresses", "read_names"]

_TABLE, _SET = "gantline", "outside"
_INSIDE = f"{{ {NODE_NETWORK}, {POD_CIDR}, {SERVICE_CIDR}, 224.0.0.0/4 }}"
"""The cluster's own: packets to a pod that is gone, or to a Service before it is translated, take the default route as well."""
_RECORD = f"ip daddr != {_INSIDE} meta l4proto {{ tcp, udp }} update @{_SET} {{ ip daddr . th dport }}"
NO_WAY_OUT = f"""
table ip {_TABLE} {{
    set {_SET} {{
        type ipv4_addr . inet_service
        size 1024
        flags dynamic
    }}
    chain forward {{
        type filter hook forward priority filter;
        oifname "node0" {_RECORD}
        oifname "node0" reject with icmp net-unreachable
    }}
    chain output {{
        type filter hook output priority filter;
        oifname "node0" {_RECORD}
    }}
}}
"""
"""For `nft -f`, in the node's network namespace."""

_ASKED = "asked for"
DNS_LOG = f'log . "{_ASKED} {{name}}" {{\n        class denial\n    }}'
"""For the Corefile: names that do not exist."""


def read_addresses() -> list[str]:
    """`address:port` of everything that was addressed outside. To be called in the node's network namespace."""
    nft = shutil.which("nft", path=SYSTEM_PATH) or "nft"
    done = subprocess.run([nft, "-j", "list", "set", "ip", _TABLE, _SET], check=True, capture_output=True, text=True, timeout=30)
    return parse_addresses(json.loads(done.stdout))


def parse_addresses(listing: Any) -> list[str]:
    """Of nft's JSON."""
    elements = [item for part in listing["nftables"] if "set" in part for item in part["set"].get("elem", [])]
    pairs = [item.get("elem", {}).get("val", item) if "elem" in item else item for item in elements]
    return sorted("{}:{}".format(*pair["concat"]) for pair in pairs)


def parse_names(log: str) -> list[str]:
    """Names outside the cluster, of the DNS server's log. What a resolver's search list makes of them is inside, and left out."""
    asked = re.findall(rf"{_ASKED} (\S+?)\.?$", log, re.M)
    return sorted({name for name in asked if not name.endswith((DNS_DOMAIN, ".arpa"))})


def read_names(folder: Path) -> list[str]:
    """`folder` has the components' logs."""
    path = folder / "coredns.log"
    return parse_names(path.read_text(errors="replace")) if path.exists() else []
