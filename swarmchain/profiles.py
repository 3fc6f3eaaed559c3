"""Kinds of chains, and what an agent may expect of each.

| | anvil, hardhat | besu-qbft |
|---|---|---|
| blocks | one per transaction | every few seconds, final at once |
| the time that a transaction sees | the pending block's | at least the latest block's |
| gas price | the chain's; 0 if the base fee is 0 | 0, said explicitly |
| block headers | Ethereum's | longer `extraData` (the validators' seals) |
| logs | in one request | in pieces of `logs_span` blocks |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProfileName = Literal["auto", "anvil", "hardhat", "besu-qbft"]


@dataclass(frozen=True)
class Profile:
    """How to talk to one kind of chain. Durations in seconds.

    `trial_block` is the block that a call is tried on before it is sent, and whose time is "now". `head_age_max_s` is
    the age of the newest block from which on a node counts as stalled or behind; None where blocks come with
    transactions only.
    """

    name: ProfileName
    trial_block: Literal["pending", "latest"]
    is_free: bool
    has_long_extra_data: bool
    logs_span: int
    head_age_max_s: float | None
    receipt_poll_s: float
    receipt_timeout_s: float


ANVIL = Profile("anvil", "pending", is_free=False, has_long_extra_data=False, logs_span=1_000_000,
                head_age_max_s=None, receipt_poll_s=0.01, receipt_timeout_s=10.0)
HARDHAT = Profile("hardhat", "pending", is_free=False, has_long_extra_data=False, logs_span=1_000_000,
                  head_age_max_s=None, receipt_poll_s=0.02, receipt_timeout_s=10.0)
# Besu refuses logs over more than 1,000 blocks by default (--rpc-max-logs-range; later versions allow 5,000).
BESU_QBFT = Profile("besu-qbft", "latest", is_free=True, has_long_extra_data=True, logs_span=1_000,
                    head_age_max_s=60.0, receipt_poll_s=0.25, receipt_timeout_s=60.0)

PROFILES: dict[str, Profile] = {p.name: p for p in (ANVIL, HARDHAT, BESU_QBFT)}


def choose_profile(name: ProfileName, client_version: str) -> Profile:
    """The profile of this name; for `auto` the one of the node's client, and Besu's rules for a client unknown."""
    if name != "auto":
        return PROFILES[name]
    client = client_version.lower()
    return next((p for p in (ANVIL, HARDHAT) if client.startswith(p.name)), BESU_QBFT)
