"""A site at its desk: settings and key, the contract that knows it, its journal, and the outbox that both feed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from swarmchain.chain import SwarmContract
from swarmchain.config import SiteConfig, read_deployment
from swarmchain.journal import Journal
from swarmchain.keys import Signer
from swarmchain.node import Node
from swarmchain.outbox import Outbox


@dataclass(frozen=True)
class Site:
    """What a site acts with. The contract's calls go through the outbox, and so through the journal."""

    config: SiteConfig
    signer: Signer
    contract: SwarmContract
    journal: Journal
    outbox: Outbox
    index: int


def open_contract(config: SiteConfig) -> SwarmContract:
    """The consortium's contract, as the site's settings name it, to read from."""
    deployment = read_deployment(config.resolve(config.chain.deployment))
    node = Node(config.rpc_urls, timeout_s=config.chain.timeout_s, profile=config.chain.profile)
    return SwarmContract(node, deployment)


@contextlib.contextmanager
def open_site(config: SiteConfig, signer: Signer) -> Iterator[Site]:
    """The contract, and the journal of the site that signs with this key.

    Raises
    ------
    NotSite
        If the contract knows no site with this key.
    JournalError
        If the journal is another site's, or cannot be used.
    """
    contract = open_contract(config)
    index = contract.get_site_index(signer.address)
    journal = Journal(config.work_dir, chain_id=contract.chain_id, contract=contract.address, site=index)
    outbox = Outbox(contract.node, journal)
    contract.send = outbox.send
    with contextlib.closing(journal):
        yield Site(config, signer, contract, journal, outbox, index)
